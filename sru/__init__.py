"""Simple Recurrent Units: fast recurrent layers for PyTorch."""

from sru.baselines import CNN, GRU, LSTM, QRNN
from sru.cell import SRUCell
from sru.layer import SRU, presets
from sru.srupp import SRUpp, SRUppEncoder
from sru.transformer import Transformer
from sru.transformer_sru import TransformerSRU
from sru.transformer_xl import TransformerXL

__version__ = "1.0.0"
__all__ = [
    "CNN",
    "GRU",
    "LSTM",
    "QRNN",
    "SRU",
    "SRUCell",
    "SRUpp",
    "SRUppEncoder",
    "Transformer",
    "TransformerSRU",
    "TransformerXL",
    "presets",
]
