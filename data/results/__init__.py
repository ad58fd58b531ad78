"""Numbers, tables, pictures, the page of a trace.

    statistics      intervals, rank correlation, calibration, pass@k
    records         the answers of a benchmark on disk; with what a number was made
    scores          what records add up to; votes and other searches
    tables          the tables that eval.py prints
    flops           arithmetic per token
    figures         every picture: python -m data.results.figures
    page            a trace as a page; its form is trace.html

May import system.
"""
