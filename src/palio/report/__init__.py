"""The report: one self-contained HTML file, and its figures as SVG and PNG.

files          what the workflow left of an entry, or why it is missing
drawing        a figure as marks, written as SVG or PNG
figures        of a track; entry_figures of an entry
page           what stands on the page, and its HTML
build          results folder -> report folder
"""
