"""The embedded data and models: README.md says what each file is.

    topics   three topics with exact answers, made from a seed
    oracle   four tokens whose exact posterior is known

Imports nothing of the project.
"""
