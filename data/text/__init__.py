"""Text to ids and back.

    tokenizer   byte-pair encoding from a model's local files
    vocab       the forms in which a vocabulary is published
    formats     the chat formats
    chat        conversations to token files: python -m data.text.chat
    tokens      token files: packing, writing, reading
    answer      prompts as a user gives them; an answer: its tokens, their cost, where it ends
    talk        a conversation in the terminal: python sample.py --talk

May import parts, checkpoints, results, system.
"""
