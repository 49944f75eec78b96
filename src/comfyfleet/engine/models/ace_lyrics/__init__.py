"""Lyrics to ids for ACE-Step v1: romaji and cleaning turn a line into plain words, the tokenizer into ids.

Reading order: numbers, cleaning, romaji, tokenizer. No language model, no network: tables and rules only.
"""
