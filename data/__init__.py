"""Corpora: one LightningDataModule for each kind, downloads that are checked, vocabularies and word vectors."""
