"""Texts: files, words, subwords and the tables made from them."""
