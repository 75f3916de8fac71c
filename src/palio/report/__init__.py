"""The report: one self-contained HTML file, and its figures as SVG and PNG. Pure over records."""
