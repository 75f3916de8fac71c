"""The report: one self-contained HTML file, and its figures as SVG and PNG.

files          an entry's results, or why they are missing
drawing        a figure as marks, written as SVG or PNG
figures        figures of a track
entry_figures  figures of an entry
page           the content of the page
rendering      templates -> HTML, for all pages that people see
build          results folder -> report folder
"""
