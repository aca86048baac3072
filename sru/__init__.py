"""Simple Recurrent Units: fast recurrent layers for PyTorch."""

from sru import convert
from sru.baselines.recurrent import CNN, GRU, LSTM, QRNN
from sru.baselines.transformer import Transformer
from sru.baselines.transformer_xl import TransformerXL
from sru.cell import SRUCell
from sru.layer import SRU, presets
from sru.srupp import SRUpp, SRUppEncoder
from sru.transformer_sru import TransformerSRU

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
    "convert",
    "presets",
]
