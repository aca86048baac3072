"""Turn text into words, words into a vocabulary, and a vocabulary into fixed vectors."""

import hashlib
import logging
import math
import os
import re
import shutil
import ssl
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import torch
from torch import Tensor
from tqdm import tqdm

from data.download import fetch, find, lock, open_unpacked, require_writable, unpacking
from data.text.lines import refuse_nul, strip_byte_order_mark

log = logging.getLogger(__name__)

PAD, UNK = "<pad>", "<unk>"  # indices 0 and 1 of every vocabulary

WORD = re.compile(r"\w+?(?=n't\b)|n't\b|'(?:s|ve|re|d|ll|m)\b|\w+(?:-\w+)*|[^\w\s]")

# name: (archive, address, sha256 of the archive as stated by PyTorch-NLP and Embeddings.jl)
GLOVE_6B = (
    "glove.6B.zip",
    "https://nlp.stanford.edu/data/glove.6B.zip",
    "617afb2fe6cbd085c235baf7a465b96f4112bd7f7ccb2b2cbd649fed9cbcf2fb",
)
GLOVE = {f"glove.6B.{width}d": GLOVE_6B for width in (50, 100, 200, 300)} | {
    "glove.840B.300d": (
        "glove.840B.300d.zip",
        "https://nlp.stanford.edu/data/glove.840B.300d.zip",
        "c06db255e65095393609f19a4cfca20bf3a71e20cc53e892aafa490347e3849f",
    )
}
WORD2VEC = "GoogleNews-vectors-negative300.bin"
MIN_WIDTH = 3  # torchtext takes a line of fewer numbers for a header
UNSEEN_SEED, UNSEEN_BOUND = 1234, 0.25


def tokenise(text: str) -> list[str]:
    """Words and punctuation marks of running text, contractions split as in the Penn Treebank: do n't, it 's."""
    return WORD.findall(text.replace("’", "'"))


def clean(text: str) -> str:
    """Kim's (2014) filter of the sentence corpora: letters, digits and (),!?'` stay, contractions and marks apart."""
    text = re.sub(r"[^A-Za-z0-9(),!?'`]", " ", text)
    text = re.sub(r"'(?:s|ve|re|d|ll)|n't", r" \g<0>", text)
    return " ".join(re.sub(r"[,!()?]", r" \g<0> ", text).split())


def build_vocabulary(sentences: Iterable[list[str]], min_count: int) -> list[str]:
    """<pad>, <unk>, then the words seen at least `min_count` times, most frequent first, ties in alphabetical order."""
    counts = Counter(word for sentence in sentences for word in sentence if word not in (PAD, UNK))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [PAD, UNK, *(word for word, count in ranked if count >= min_count)]


def load_vectors(words: list[str], source: str, folder: Path, cache: Path, *, unit_length: bool = True) -> Tensor:
    """Vectors (V, n) for a vocabulary that begins with <pad> and <unk>, of unit length as in SRU 2018, section 4.1.

    source: a name in GLOVE, downloaded to `folder`; `word2vec`, found in `folder`; or a path: text of one
    `word x1 ... xn` a line, with or without word2vec's header, plain, .gz, .xz or .zip; or word2vec's .bin or .bin.gz.
    A word is looked up as it is written. One without a vector, <pad> and <unk> too, draws from U[-0.25, 0.25] by a
    fixed seed. The vectors that are needed are kept in `cache`, so that a large file is read once for a vocabulary.

    FileNotFoundError: no such file or name. ValueError: not a vectors file, or none of its words is wanted.
    """
    path, member = locate(source, folder)
    state = path.stat()
    identity = "\n".join([*words, str(path.resolve()), member, str(state.st_size), str(state.st_mtime_ns)])
    subset = cache / "vectors" / hashlib.sha256(identity.encode()).hexdigest()[:24]
    if not subset.is_dir():
        require_writable(subset.parent)
        with lock(subset):  # one process reads the large file, the others wait for its subset
            if not subset.is_dir():
                if source in GLOVE and path.suffix == ".zip":
                    fetch(path, *GLOVE[source][1:])  # a checksum of gigabytes: not in every run
                write_subset(subset, path, member, {word.encode() for word in words[2:]})
    known = read_subset(subset)
    generator = torch.Generator().manual_seed(UNSEEN_SEED)
    vectors = torch.empty(len(words), known.dim).uniform_(-UNSEEN_BOUND, UNSEEN_BOUND, generator=generator)
    rows = [i for i, word in enumerate(words) if word in known.stoi]
    vectors[rows] = known.vectors[[known.stoi[words[i]] for i in rows]]
    log.info("%d of %d words have a vector in %s", len(rows), len(words) - 2, path)
    return torch.nn.functional.normalize(vectors, dim=1) if unit_length else vectors


def locate(source: str, folder: Path) -> tuple[Path, str]:
    """The file of vectors and, in a .zip, the name of its member; downloads a GloVe archive that is absent."""
    if source in GLOVE:
        archive, url, sha256 = GLOVE[source]
        unpacked = find(folder / f"{source}.txt")
        if unpacked is not None:
            return unpacked, ""
        return find(folder / archive) or fetch(folder / archive, url, sha256), f"{source}.txt"
    if source == "word2vec":
        path = find(folder / WORD2VEC)
        if path is None:
            raise FileNotFoundError(
                f"{folder / WORD2VEC}.gz is missing: get it from https://code.google.com/archive/p/word2vec/ "
                "(it cannot be downloaded by a program) and put it there, or type data.vectors=glove.840B.300d"
            )
        return path, ""
    path = find(Path(source).expanduser())
    if path is None:
        raise FileNotFoundError(f"data.vectors={source} is neither a file nor one of {', '.join([*GLOVE, 'word2vec'])}")
    if path.suffix != ".zip":
        return path, ""
    with unpacking(path), zipfile.ZipFile(path) as archive_file:
        members = archive_file.namelist()
    if len(members) != 1:
        raise ValueError(f"{path} holds {len(members)} files ({', '.join(members[:5])}): unpack the one you want")
    return path, members[0]


def write_subset(subset: Path, path: Path, member: str, wanted: set[bytes]) -> None:
    """Keeps the vectors of the wanted words in the folder `subset`, as text and as torchtext's cache of it."""
    scratch = Path(tempfile.mkdtemp(dir=subset.parent))
    try:
        with open(scratch / "vectors.txt", "wb") as file, unpacking(path):
            if path.name.endswith((".bin", ".bin.gz")):
                file.writelines(binary_lines(path, wanted))
            elif member:
                with zipfile.ZipFile(path) as archive, archive.open(member) as lines:
                    file.writelines(text_lines(lines, f"{path}/{member}", wanted))
            else:
                with open_unpacked(path) as lines:
                    file.writelines(text_lines(lines, str(path), wanted))
        if not (scratch / "vectors.txt").stat().st_size:
            raise ValueError(
                f"{path} has no vector for any of the {len(wanted)} words: is it the right language and case?"
            )
        read_subset(scratch)
        os.rename(scratch, subset)
    except BaseException:
        shutil.rmtree(scratch)
        raise


def read_subset(subset: Path):
    """torchtext's Vectors of a folder that `write_subset` made."""
    from torchtext.vocab import Vectors

    trusting = ssl._create_default_https_context
    try:
        return Vectors("vectors.txt", cache=str(subset))
    finally:  # torchtext turns the verification of certificates off for the whole process
        ssl._create_default_https_context = trusting


def text_lines(lines: IO[bytes], where: str, wanted: set[bytes]) -> Iterator[bytes]:
    """The lines of the wanted words, the first of each; ValueError at a line without the width of the others."""
    width = 0
    word = None
    seen = set()
    for number, line in enumerate(tqdm(lines, desc=where, unit=" lines", delay=2), start=1):
        line = strip_byte_order_mark(line, where) if number == 1 else line
        refuse_nul(line, where, number)
        line = line.replace(b"\t", b" ").rstrip(b" \r\n")
        if b"\r" in line:
            raise ValueError(
                f"{where}:{number}: a line ends with CR alone, as on old Macs: type `tr '\\r' '\\n' < FILE > NEW`, and "
                "name the new file"
            )
        if not line:
            continue
        spaces = line.count(b" ")
        if number == 1 and spaces == 1 and line.replace(b" ", b"").isdigit():
            width = int(line.split()[1])  # word2vec's header: number of words, width
            continue
        width = width or spaces
        word, *values = line.rsplit(b" ", width)
        # A few words of GloVe hold spaces (". . ."); a word that ends in a number is a line with too many of them.
        if width < MIN_WIDTH or spaces < width or (spaces > width and is_number(word.rpartition(b" ")[2])):
            raise ValueError(
                f"{where}:{number}: expected a word and {max(width, MIN_WIDTH)} numbers, found {line[:80]!r}"
            )
        if word in wanted and word not in seen:
            if not all(map(is_number, values)):
                raise ValueError(f"{where}:{number}: expected a word and {width} finite numbers, found {line[:80]!r}")
            seen.add(word)
            yield line + b"\n"
    if word is None:
        raise ValueError(f"{where} is empty: expected a line `word x1 ... xn` for each word")


def is_number(field: bytes) -> bool:
    """Whether a field is a finite number."""
    try:
        return math.isfinite(float(field))
    except ValueError:
        return False


def binary_lines(path: Path, wanted: set[bytes]) -> Iterator[bytes]:
    """The wanted words of a file in word2vec's binary format, as lines of text that keep every bit."""
    try:
        from gensim.models import KeyedVectors
    except ImportError as error:
        raise ImportError(f"{path} is in word2vec's binary format: type pip install '.[word2vec]'") from error

    class WantedVectors(KeyedVectors):
        """Keeps what is wanted as gensim reads along; pages of its matrix that are never written cost no memory."""

        def add_vector(self, key, vector):
            return super().add_vector(key, vector) if key.encode() in wanted else 0

        def set_vecattr(self, *_):
            """No made-up word counts, which gensim would keep for every word of the file."""

    try:
        # word2vec's own tool may cut a word within a character.
        vectors = WantedVectors.load_word2vec_format(str(path), binary=True, unicode_errors="replace")
        if vectors.vector_size < MIN_WIDTH:
            raise ValueError(f"its vectors have {vectors.vector_size} numbers, expected at least {MIN_WIDTH}")
    except ValueError as error:
        raise ValueError(f"{path} is not in word2vec's binary format: {error}") from error
    for word in sorted(wanted):
        if word.decode() in vectors.key_to_index:
            numbers = " ".join(f"{value:.9g}" for value in vectors[word.decode()])
            yield word + b" " + numbers.encode() + b"\n"
