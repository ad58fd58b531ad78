"""When two answers of MATH are equal.

    equal   extraction, the strict rules, structure
    latex   LaTeX cleaned and taken apart
    value   what a piece of LaTeX is worth
"""
