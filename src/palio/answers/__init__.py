"""What entries answered, question by question, for people: in the terminal, and as pages beside the report.

reading     HELM's runs of an entry -> `Answer`s
comparison  full marks; which questions decide between two entries
listing     answers as lines of a terminal
viewer      the same runs for HELM's own viewer
pages       answers of the open stage as static pages that load their data in parts

The closed stage's are for the organizer's terminal alone: they are read from the closed store, and no page
has them.
"""
