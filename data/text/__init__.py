"""Text to ids and back.

    tokenizer   byte-pair encoding from a model's local files
    vocab       the forms in which a vocabulary is published
    formats     the chat formats
    chat        conversations to token files: python -m data.text.chat
    tokens      token files: packing, writing, reading
    answer      an answer: its tokens, their cost, and where it ends
    prompts     prompts as a user gives them

May import parts, checkpoints, results, system.
"""
