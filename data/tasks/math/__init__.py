"""Grading of MATH answers: are two of them equal?

    equal   extraction, the strict rules, comparison of the parts
    latex   LaTeX cleaned and taken apart
    value   the value of a piece of LaTeX
"""
