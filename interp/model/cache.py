"""The activations of one run, by site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from interp.model.sites import Site


class Cache(Mapping[str, Tensor]):
    """Read-only mapping from site names to activations, in the order in which they were computed.

    `cache["blocks.5.attn.hook_z"]` and `cache["z", 5]` are the same. Left-padded prompts keep their padding;
    `n_padding` says how many columns of each row it is.
    """

    def __init__(self, activations: Mapping[Site, Tensor], n_padding: Tensor | None = None) -> None:
        self._activations = dict(activations)
        self.n_padding = n_padding

    def __getitem__(self, key: str | tuple[str, int]) -> Tensor:
        site = Site(*key) if isinstance(key, tuple) else self._named(key)
        if site not in self._activations:
            kinds = sorted({one.kind for one in self._activations})
            raise KeyError(f"{site} was not cached; this cache holds {', '.join(kinds)}: ask for it in `sites`")
        return self._activations[site]

    def _named(self, key: str) -> Site:
        single = [site for site in self._activations if site.kind == key and site.layer is None]
        return single[0] if single else Site.parse(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def __contains__(self, key: object) -> bool:
        return key in self._activations

    def stack(self, kind: str) -> Tensor:
        """All layers of one kind of site: [layer, ...].

        Raises:
            KeyError: if none was cached.
        """
        kind = Site(kind, 0).kind
        layers = [tensor for site, tensor in self._activations.items() if site.kind == kind and site.tower == ""]
        if not layers:
            raise KeyError(f"no {kind} was cached")
        return torch.stack(layers)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Cache:
        """A cache with every activation moved or cast."""
        return Cache({site: tensor.to(device, dtype) for site, tensor in self._activations.items()}, self.n_padding)

    @property
    def nbytes(self) -> int:
        """Memory held, counting storage shared between sites once."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in self._activations.values()
        }
        return sum(storage.nbytes() for storage in storages.values())

    def __repr__(self) -> str:
        kinds = list(dict.fromkeys(site.kind for site in self._activations))
        return f"Cache({len(self)} activations: {', '.join(kinds)}; {self.nbytes / 2**20:.1f} MiB)"
