"""The networks that the papers compare the SRU with."""

from sru.baselines.recurrent import CNN, GRU, LSTM, QRNN
from sru.baselines.transformer import Transformer
from sru.baselines.transformer_xl import TransformerXL

__all__ = ["CNN", "GRU", "LSTM", "QRNN", "Transformer", "TransformerXL"]
