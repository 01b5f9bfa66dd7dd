"""A hooked view of any Hugging Face transformer: anatomy, sites, hooks, attention, cache, load."""

from interp.model.anatomy import UnsupportedModel
from interp.model.cache import Cache
from interp.model.edit import Edit
from interp.model.hook_point import HookPoint
from interp.model.model import Model
from interp.model.sites import Site, SiteUnavailable

__all__ = ["Cache", "Edit", "HookPoint", "Model", "Site", "SiteUnavailable", "UnsupportedModel"]
