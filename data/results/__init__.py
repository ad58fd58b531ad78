"""Numbers, tables, pictures and the page of a trace.

    statistics      intervals, rank correlation, calibration, pass@k
    tables          the tables that eval.py prints
    records         the answers of a benchmark on disk; the provenance of a result
    scores          the scores of records; votes and other searches
    flops           arithmetic per token
    figures         every picture: python -m data.results.figures
    page            a trace as a page; its form is trace.html

May import system.
"""
