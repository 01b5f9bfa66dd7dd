"""Activations on disk: gathered once, read in any order by many trainings.

A cache is a folder with `manifest.json` and shards `shard-00000.safetensors`, each with the rows [row, d] of every
site, the token ids [sequence, pos] and which of them were kept. A shard appears when it is whole and is then entered
in the manifest, so that a run killed half-way goes on after the last whole shard. Rows are read through memory maps.
One process at a time writes to a cache: another is refused.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.model import Model, Site
from interp.patching.labels import model_provenance
from interp.patching.progress import progress_bar
from interp.patching.writing import only_writer, replace_text
from interp.saes.activations import Keep, LeftOut, Rows, digest_of_mask, digest_of_model, keeper, rows_of
from interp.saes.checkpoint import check_settings
from interp.saes.distributed import rank_and_size
from interp.saes.randomness import generator
from interp.saes.text import Chunk, Text, TextSource, open_text

FORMAT = "interp.activations"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_RAW = {"float32": np.float32, "bfloat16": np.int16, "float16": np.float16}
"""As numpy reads them; bfloat16, which it does not know, as whole numbers of the same bits."""


class ActivationCache:
    """A cache on disk, whole or as far as it has come.

    Args:
        folder: where it is.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming what is damaged or of a later version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.sites = [Site.parse(name) for name in self.manifest["sites"]]
        self._shards = self.manifest["shards"]
        self._starts = [0, *itertools.accumulate(shard["rows"] for shard in self._shards)]
        self._maps: dict[tuple[int, Site], np.memmap[Any, Any]] = {}

    def __repr__(self) -> str:
        return f"ActivationCache({self.folder}: {self.n_rows} tokens of {', '.join(self.sites)})"

    @property
    def n_rows(self) -> int:
        """Tokens whose activations are kept."""
        return int(self._starts[-1])

    @property
    def text(self) -> str:
        """What its text is: by this trainings are told apart."""
        settings = self.manifest["settings"]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        return f"{self.n_rows} cached tokens of {settings['text']} ({digest})"

    def check_model(self, model: Model) -> None:
        """Raises ValueError unless the activations are this model's."""
        found = self.manifest["settings"]["weights"]
        if found != digest_of_model(model):
            what = f"{self.folder} holds activations of {self.manifest['settings']['model']} ({found})"
            raise ValueError(f"{what}; {model.name} has other weights, or another dtype: gather them again")

    def rows(self, site: str, indices: Int[Tensor, " row"]) -> Float[Tensor, "row d"]:
        """Rows by number, in the order asked for, as float32 on the CPU.

        Raises:
            ValueError: for a site that is not here, or numbers out of range.
        """
        name = Site.parse(site)
        if name not in self.sites:
            raise ValueError(f"{self.folder} holds no {site}; it holds {', '.join(self.sites)}")
        if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= self.n_rows):
            span = f"{int(indices.min())}..{int(indices.max())}"
            raise ValueError(f"rows run 0..{self.n_rows - 1}; {span} were asked for")
        found = torch.empty(len(indices), self.manifest["widths"][str(name)])
        # In the order they lie on disk, whatever the order asked for.
        order = indices.argsort()
        ordered = indices[order].tolist()
        for number, (first, end) in enumerate(itertools.pairwise(self._starts)):
            low, high = bisect.bisect_left(ordered, first), bisect.bisect_left(ordered, end)
            if low < high:
                inside = (indices[order[low:high]] - first).numpy()
                raw = torch.from_numpy(self._map(number, name)[inside])
                found[order[low:high]] = raw.view(DTYPES[self.manifest["settings"]["dtype"]]).float()
        return found

    def tokens(self) -> Int[Tensor, "sequence pos"]:
        """Token ids of all sequences."""
        return torch.cat([load_file(self.folder / shard["file"])["tokens"] for shard in self._shards]).long()

    def origins(self) -> Int[Tensor, "row 2"]:
        """Which token each row is of: its sequence and its position in `tokens()`."""
        kept = [load_file(self.folder / shard["file"])["kept"] for shard in self._shards]
        return torch.cat(kept).nonzero()

    def batches(self, sites: Sequence[Site], *, batch_size: int, seed: int, device: torch.device) -> CachedBatches:
        """Shuffled batches for training."""
        return CachedBatches(self, sites, batch_size=batch_size, seed=seed, device=device)

    def _map(self, number: int, site: Site) -> np.memmap[Any, Any]:
        if (number, site) not in self._maps:
            path = self.folder / self._shards[number]["file"]
            with path.open("rb") as file:
                size = struct.unpack("<Q", file.read(8))[0]
                header = json.loads(file.read(size))[str(site)]
            raw = _RAW[self.manifest["settings"]["dtype"]]
            offset = 8 + size + header["data_offsets"][0]
            self._maps[number, site] = np.memmap(path, raw, "r", offset, tuple(header["shape"]))
        return self._maps[number, site]


class CachedBatches:
    """Batches of a cache's rows, each row once an epoch, in a new order every epoch.

    Raises:
        ValueError: if the cache is smaller than a batch or lacks a site.
    """

    def __init__(
        self, cache: ActivationCache, sites: Sequence[Site], *, batch_size: int, seed: int, device: torch.device
    ) -> None:
        if cache.n_rows < batch_size:
            raise ValueError(f"{cache.folder} holds {cache.n_rows} tokens; a batch is {batch_size}")
        missing = [site for site in sites if site not in cache.sites]
        if missing:
            raise ValueError(f"{cache.folder} holds no {missing[0]}; it holds {', '.join(cache.sites)}")
        self._cache, self._sites, self._batch_size = cache, list(sites), batch_size
        self._seed, self._device = seed, device
        self._n_served = 0
        self._epoch: tuple[int, Tensor] | None = None

    def widths(self) -> dict[Site, int]:
        """Numbers a row of each site."""
        return {site: self._cache.manifest["widths"][str(site)] for site in self._sites}

    def next_batch(self) -> Rows | None:
        """This process's share of the next batch. Rows that do not fill a last batch wait for another epoch."""
        epoch, number = divmod(self._n_served, self._cache.n_rows // self._batch_size)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, torch.randperm(self._cache.n_rows, generator=generator(self._seed, "cache", epoch))
        rank, size = rank_and_size()
        rows = self._epoch[1][number * self._batch_size : (number + 1) * self._batch_size].chunk(size)[rank]
        self._n_served += 1
        return self._read(rows)

    def sample(self, n: int, seed: int) -> Rows:
        """Up to so many rows of all, at random."""
        return self._read(torch.randperm(self._cache.n_rows, generator=generator(seed, "sample"))[:n])

    def state(self) -> dict[str, Tensor]:
        """How many batches were served: all else follows."""
        return {"n_served": torch.tensor(self._n_served)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        self._n_served = int(state["n_served"])

    def _read(self, rows: Int[Tensor, " row"]) -> Rows:
        return {site: self._cache.rows(site, rows).to(self._device) for site in self._sites}


def cache_activations(
    model: Model,
    sites: str | Sequence[str],
    text: TextSource,
    folder: str | Path,
    *,
    n_tokens: int,
    mask: LeftOut | None = None,
    skip_tokens: Sequence[int] = (),
    positions: slice = slice(None),
    length: int = 128,
    chunk_tokens: int = 1024,
    shard_tokens: int = 2**16,
    dtype: str = "float32",
    revision: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> ActivationCache:
    """Write activations of sites to a folder; a call with the same folder and settings goes on after an interruption.

    Costs one forward pass as far as the last site, and `dtype`'s bytes a number on disk.

    Args:
        model: the model.
        sites: names, short forms or patterns.
        text: as for `train`; read once.
        folder: made if need be.
        n_tokens: tokens to keep at least; it ends with the shard that reaches them, or with the text if that ends.
        mask: tokens to leave out (True), as for `train`.
        skip_tokens: token ids to leave out.
        positions: positions to keep.
        length: tokens a row of text.
        chunk_tokens: tokens a forward pass.
        shard_tokens: tokens of text a file, about.
        dtype: "float32", "bfloat16" or "float16", as stored.
        revision: of the model; what its config says by default.
        seed: of the order of token ids.
        progress: show a progress bar; None: in a terminal or notebook only.

    Raises:
        ValueError: before anything is run, if a setting does not fit, or the folder holds another cache; if all of a
            shard is left out.
        BlockingIOError: if another process is writing to the folder.
        FloatingPointError: naming the site, if an activation is not finite, or not in `dtype`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; it is one of {', '.join(DTYPES)}")
    if n_tokens < 1:
        raise ValueError(f"n_tokens={n_tokens}; give 1 at least")
    wanted = model.site_names(sites)
    opened = open_text(model, text, length=length, chunk_tokens=chunk_tokens, seed=seed, repeat=False)
    skipped = [int(one) for one in skip_tokens]
    keep = keeper(opened, wanted, mask=mask, skip_tokens=skipped, positions=positions)
    settings = {
        "model": model.name,
        "weights": digest_of_model(model),
        "revision": revision or getattr(model.hf.config, "_commit_hash", None),
        "sites": [str(site) for site in wanted],
        "text": opened.name,
        "length": opened.length,
        "chunk_size": opened.chunk_size,
        "chunks_a_shard": max(1, shard_tokens // (opened.chunk_size * opened.length)),
        "dtype": dtype,
        "mask": digest_of_mask(mask),
        "skip_tokens": skipped,
        "positions": str(positions),
        "seed": seed,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    with only_writer(Path(folder)):
        manifest = _manifest_to_continue(Path(folder), settings, model_provenance(model))
        _fill(Path(folder), manifest, model, wanted, opened, keep, n_tokens, progress)
    return ActivationCache(folder)


def _fill(
    folder: Path,
    manifest: dict[str, Any],
    model: Model,
    sites: Sequence[Site],
    text: Text,
    keep: Keep,
    n_tokens: int,
    progress: bool | None,
) -> None:
    """Add shards until there are so many tokens, or the text ends."""
    settings, shards = manifest["settings"], manifest["shards"]
    chunks = text.chunks_from(len(shards) * settings["chunks_a_shard"])
    n_rows = sum(shard["rows"] for shard in shards)
    with progress_bar(n_tokens, "activations", "token", progress=progress, done=min(n_rows, n_tokens)) as bar:
        while n_rows < n_tokens and (held := list(itertools.islice(chunks, settings["chunks_a_shard"]))):
            _add_shard(folder, manifest, _shard(model, held, sites, keep, DTYPES[settings["dtype"]]))
            n_rows += shards[-1]["rows"]
            bar.update(shards[-1]["rows"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache, checked, with every shard it names in place.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming what is damaged or of a later version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no activations: there is no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or manifest["version"] != FORMAT_VERSION:
            raise ValueError(f"format {manifest['format']!r} version {manifest['version']!r}, not {FORMAT} 1")
        for shard in manifest["shards"]:
            size = (folder / shard["file"]).stat().st_size if (folder / shard["file"]).is_file() else 0
            if size != shard["bytes"]:
                raise ValueError(f"shard {shard['file']} has {size} bytes, not {shard['bytes']}")
    except (ValueError, KeyError, TypeError) as error:
        what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: {what}") from None
    return dict(manifest)


def _manifest_to_continue(folder: Path, settings: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a cache that was begun with the same settings, or a new one."""
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        check_settings(manifest["settings"], settings, folder)
        return manifest
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "settings": dict(settings),
        "provenance": dict(provenance),
        "sites": settings["sites"],
        "widths": {},
        "shards": [],
    }


def _shard(
    model: Model, chunks: Sequence[Chunk], sites: Sequence[Site], keep: Keep, dtype: torch.dtype
) -> dict[str, Tensor]:
    tokens, kept = torch.cat([chunk.tokens for chunk in chunks]), [keep(chunk) for chunk in chunks]
    if not any(bool(one.any()) for one in kept):
        raise ValueError(f"all {tokens.numel()} tokens of a shard are left out: check mask, skip_tokens and positions")
    parts = [rows_of(model, chunk.tokens, sites, one) for chunk, one in zip(chunks, kept, strict=True)]
    rows = {str(site): torch.cat([part[site] for part in parts]).to("cpu", dtype).contiguous() for site in sites}
    for name, values in rows.items():
        if not bool(values.isfinite().all()):
            raise FloatingPointError(f"{name} has values beyond {dtype}: store them as bfloat16 or float32")
    return {**rows, "tokens": tokens.to(torch.int32), "kept": torch.cat(kept)}


def _add_shard(folder: Path, manifest: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a shard, then enter it in the manifest; each is whole or not there."""
    name = f"shard-{len(manifest['shards']):05}.safetensors"
    part = folder / f".{name}.part"
    save_file(dict(tensors), part)
    os.replace(part, folder / name)
    manifest["widths"] = {site: tensors[site].shape[1] for site in manifest["sites"]}
    entry = {
        "file": name,
        "rows": len(tensors[manifest["sites"][0]]),
        "sequences": len(tensors["tokens"]),
        "bytes": (folder / name).stat().st_size,
    }
    manifest["shards"].append(entry)
    replace_text(json.dumps(manifest, indent=1), folder / MANIFEST)
