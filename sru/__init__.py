"""Simple Recurrent Units: fast recurrent layers for PyTorch."""

from sru.baselines import CNN, GRU, LSTM, QRNN
from sru.layer import SRU, SRUCell

__version__ = "0.1.0"
__all__ = ["CNN", "GRU", "LSTM", "QRNN", "SRU", "SRUCell"]
