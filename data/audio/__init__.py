"""Sound: features, labels, Kaldi's files and batches of utterances."""
