"""Generators behind the embedded default: five small task families, a pretraining corpus, a tokenizer, a tiny base.

Everything is made from code and a seed; nothing is downloaded and no text of other people is copied.
"""
