"""Words of a text, the vocabulary of words, and fixed word vectors for a vocabulary."""

import hashlib
import logging
import math
import re
import ssl
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import torch
from torch import Tensor
from tqdm import tqdm

from data.cache import prepare_folder
from data.download import fetch, find, open_unpacked, unpacking
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
MIN_WIDTH = 3  # torchtext reads a line with fewer numbers as a header
UNSEEN_SEED, UNSEEN_BOUND = 1234, 0.25


def tokenise(text: str) -> list[str]:
    """Words and punctuation marks of a text; contractions are split as in the Penn Treebank: do n't, it 's."""
    return WORD.findall(text.replace("’", "'"))


def clean(text: str) -> str:
    """Kim's (2014) filter of the sentence corpora: keeps letters, digits and (),!?'`; splits contractions and marks."""
    text = re.sub(r"[^A-Za-z0-9(),!?'`]", " ", text)
    text = re.sub(r"'(?:s|ve|re|d|ll)|n't", r" \g<0>", text)
    return " ".join(re.sub(r"[,!()?]", r" \g<0> ", text).split())


def build_vocabulary(sentences: Iterable[list[str]], min_count: int) -> list[str]:
    """<pad>, <unk>, then words with at least `min_count` occurrences, most frequent first, ties alphabetically."""
    counts = Counter(word for sentence in sentences for word in sentence if word not in (PAD, UNK))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [PAD, UNK, *(word for word, count in ranked if count >= min_count)]


def load_vectors(words: list[str], source: str, folder: Path, cache: Path, *, unit_length: bool = True) -> Tensor:
    """Vectors (V, n) for a vocabulary that begins with <pad> and <unk>, of unit length as in SRU 2018, section 4.1.

    source: a name in GLOVE, downloaded to `folder`; `word2vec`, which must be in `folder`; or the path of a file:
    word2vec's .bin or .bin.gz, or text with one `word x1 ... xn` a line, with or without word2vec's header, plain, .gz,
    .xz or .zip. The look-up respects case. Words without a vector, <pad> and <unk> get random values in U[-0.25, 0.25]
    with a fixed seed. The cache stores the vectors of this vocabulary, so a large file is read once.

    FileNotFoundError: no such file or name. ValueError: not a vectors file, or it contains none of the words.
    """
    path, member = locate(source, folder)
    state = path.stat()
    identity = "\n".join([*words, str(path.resolve()), member, str(state.st_size), str(state.st_mtime_ns)])
    subset = cache / "vectors" / hashlib.sha256(identity.encode()).hexdigest()[:24]

    def build(subset: Path) -> None:
        if source in GLOVE and path.suffix == ".zip":
            fetch(path, *GLOVE[source][1:])  # verifies the checksum, which takes too long for every run
        write_subset(subset, path, member, {word.encode() for word in words[2:]})

    known = read_subset(prepare_folder(subset, build))
    generator = torch.Generator().manual_seed(UNSEEN_SEED)
    vectors = torch.empty(len(words), known.dim).uniform_(-UNSEEN_BOUND, UNSEEN_BOUND, generator=generator)
    rows = [i for i, word in enumerate(words) if word in known.stoi]
    vectors[rows] = known.vectors[[known.stoi[words[i]] for i in rows]]
    log.info("%d of %d words have a vector in %s", len(rows), len(words) - 2, path)
    return torch.nn.functional.normalize(vectors, dim=1) if unit_length else vectors


def locate(source: str, folder: Path) -> tuple[Path, str]:
    """The file of vectors and, for a GloVe archive, the name of its member; downloads an absent GloVe archive."""
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
                f"{folder / WORD2VEC}.gz is missing: download it from https://code.google.com/archive/p/word2vec/ "
                "in a browser and put it there, or type data.vectors=glove.840B.300d"
            )
        return path, ""
    path = find(Path(source).expanduser())
    if path is None:
        raise FileNotFoundError(f"data.vectors={source} is neither a file nor one of {', '.join([*GLOVE, 'word2vec'])}")
    return path, ""


def write_subset(subset: Path, path: Path, member: str, wanted: set[bytes]) -> None:
    """Writes the vectors of the wanted words to the folder `subset`, as text and as torchtext's cache of it."""
    with open(subset / "vectors.txt", "wb") as file, unpacking(path):
        if path.name.endswith((".bin", ".bin.gz")):
            file.writelines(binary_lines(path, wanted))
        elif member:
            with zipfile.ZipFile(path) as archive, archive.open(member) as lines:
                file.writelines(text_lines(lines, f"{path}/{member}", wanted))
        else:
            with open_unpacked(path) as lines:
                file.writelines(text_lines(lines, str(path), wanted))
    if not (subset / "vectors.txt").stat().st_size:
        raise ValueError(f"{path} has no vector for any of the {len(wanted)} words: is it the right language and case?")
    read_subset(subset)


def read_subset(subset: Path):
    """torchtext's Vectors from a folder of `write_subset`."""
    from torchtext.vocab import Vectors

    trusting = ssl._create_default_https_context
    try:
        return Vectors("vectors.txt", cache=str(subset))
    finally:  # torchtext disables the verification of certificates for the whole process
        ssl._create_default_https_context = trusting


def text_lines(lines: IO[bytes], where: str, wanted: set[bytes]) -> Iterator[bytes]:
    """The first line of each wanted word; ValueError at a line of another width."""
    width = 0
    word = None
    seen = set()
    for number, line in enumerate(tqdm(lines, desc=where, unit=" lines", delay=2), start=1):
        line = strip_byte_order_mark(line, where) if number == 1 else line
        refuse_nul(line, where, number)
        line = line.replace(b"\t", b" ").rstrip(b" \r\n")
        if b"\r" in line:
            raise ValueError(
                f"{where}:{number}: lines end with CR, as on old Macs: type `tr '\\r' '\\n' < FILE > NEW`, and name "
                "the new file"
            )
        if not line:
            continue
        spaces = line.count(b" ")
        if number == 1 and spaces == 1 and line.replace(b" ", b"").isdigit():
            width = int(line.split()[1])  # word2vec's header: number of words, width
            continue
        width = width or spaces
        word, *values = line.rsplit(b" ", width)
        # A few words of GloVe contain spaces (". . ."). If the word ends in a number, the line has too many numbers.
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
    """The wanted words of a file in word2vec's binary format, as lines of text without loss of precision."""
    try:
        from gensim.models import KeyedVectors
    except ImportError as error:
        raise ImportError(f"{path} is in word2vec's binary format: type pip install '.[word2vec]'") from error

    class WantedVectors(KeyedVectors):
        """Stores only wanted vectors; unwritten pages of gensim's matrix need no memory."""

        def add_vector(self, key, vector):
            return super().add_vector(key, vector) if key.encode() in wanted else 0

        def set_vecattr(self, *_):
            """Omits the word counts that gensim stores for every word of the file."""

    try:
        # word2vec's own tool may truncate a word within a character.
        vectors = WantedVectors.load_word2vec_format(str(path), binary=True, unicode_errors="replace")
        if vectors.vector_size < MIN_WIDTH:
            raise ValueError(f"its vectors have {vectors.vector_size} numbers, expected at least {MIN_WIDTH}")
    except ValueError as error:
        raise ValueError(f"{path} is not in word2vec's binary format: {error}") from error
    for word in sorted(wanted):
        if word.decode() in vectors.key_to_index:
            numbers = " ".join(f"{value:.9g}" for value in vectors[word.decode()])
            yield word + b" " + numbers.encode() + b"\n"
