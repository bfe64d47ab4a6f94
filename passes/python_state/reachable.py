"""The Python values that a forward can reach, copied before it runs.

The state of a model is more than its attributes: objects that it holds, variables of its Python
files, of enclosing functions, of classes. `ReachableState` follows the references that the code
which runs can follow: it starts from the model's modules and is told of every function that is
called, and looks only at attributes that the called code names.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections import defaultdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import nn

from autopipe.passes._torch import parametrization_cache
from autopipe.passes.graph import is_own_file, is_user_file

from .holder_of import container_of, objects_of
from .holders import (
    CONTENT,
    REGISTRIES,
    Cell,
    ClassAttributes,
    Dict,
    Globals,
    Holder,
    ModuleAttributes,
    Namespace,
    Registry,
)
from .iterators import iterator_state
from .kinds import is_collection, is_shallow, is_torchs, is_user_module, is_users_class, owner_of
from .members import ForeignFunctions, Members, members_of
from .names import compares_objects, compares_types, global_names, names_in, reads_unnamed
from .noted import Noted
from .random_numbers import GENERATORS, saved_generator

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterable
    from types import FrameType

LARGEST_FOLLOWED = 200
"""How many entries of a container are followed."""

DEEPEST = 8
"""How many references are followed from one that the code names."""


class ReachableState:
    """Copies of the Python values that a model's code can reach.

    Args:
        model: the model, before its forward.

    Attributes:
        values: owner's id, kind of holder → the holder, and its values when it was first seen.
        names: all names that the called code uses.
        followed: ids of the containers that the called code can reach.
        whole: ids of the owners any of whose values may have been read.
        noted: what the forward asked for.
        is_watched: whether it was told of the functions that were called.
        reads_unnamed: whether some code may have read attributes that it does not name.
        caches: functions found that cache results (`functools.lru_cache`), and their cache's size.
        generators: random generators found that are not torch's, by label, and their states.
        iterators: those of Python found, by label, and their states.
    """

    def __init__(self, model: nn.Module) -> None:
        self.values: dict[Hashable, tuple[Holder, dict[Hashable, Any]]] = {}
        self.names: set[str] = set()
        self.followed: set[int] = set()
        self.whole: set[int] = set()
        self.noted = Noted(model)
        self.is_watched = False
        self.reads_unnamed = False
        self._unnamed = False  # whether the function just entered may
        self.caches: dict[int, tuple[Any, Any]] = {}
        self.generators: dict[str, tuple[Any, Any]] = {}
        self.iterators: dict[str, tuple[Any, Hashable]] = {}
        self._known: set[int] = set()  # values that the model's state refers to
        self._now: set[int] = set()  # those that were visited for the function just entered
        self._entered: set[tuple[object, ...]] = set()
        self._given: tuple[list[Any], list[type]] = [], []  # arguments, classes of others
        self._own = {id(m): path for path, m in model.named_modules()}
        for path, module in model.named_modules():
            if not isinstance(module._buffers, dict):  # a scripted module has no Python state
                continue
            for registry, kind in REGISTRIES.items():
                if registry in vars(module):
                    self._add(Registry(vars(module)[registry], path, kind))
            attributes = self._add(ModuleAttributes(module, path))
            for key, value in list(attributes.items()):
                self._visit_container(value, f"{path}.{key}".lstrip("."), 0)
            if not is_users_class(type(module)):  # the code of others is not watched
                self._add(Members(type(module), type(module).__qualname__, ("forward",)))
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
                self._visit(hook, f"a hook of {path or 'the model'}", set(), 0)
        self._add(Dict(parametrization_cache(), "torch.nn.utils.parametrize.cached()"))

    def add_arguments(self, values: Iterable[Any], kinds: Iterable[type]) -> None:
        """Follow what is passed to the model, besides tensors.

        Args:
            values: arguments that are the user's own objects.
            kinds: the classes of those of which the model gets copies.
        """
        self._given = [v for v in values if not is_shallow(v)], list(kinds)

    def enter(self, frame: FrameType) -> None:
        """Copy what a function that is being called can reach; it has not run yet.

        Args:
            frame: of the function.
        """
        code = frame.f_code
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        found = {n: frame.f_locals.get(n) for n in (*arguments, *code.co_freevars)}
        known = {n: v for n, v in found.items() if id(v) in self._known or id(v) in self._own}
        if (called := (code, *map(id, known.values()))) in self._entered:
            return
        self._entered.add(called)
        names = names_in(code)
        self.names |= names
        self._unnamed = reads_unnamed(code)
        self.reads_unnamed |= self._unnamed
        if compares_objects(code):
            self.noted.arguments.add("identity")
        if compares_types(code):
            self.noted.note_type_comparison(f"{code.co_filename}:{code.co_firstlineno}")
        self._now.clear()
        used = names if "globals" in names else global_names(code)  # globals()["scale"]
        self._enter_globals(frame.f_globals, used, names)
        for name in names & sys.modules.keys() if "modules" in names else ():  # sys.modules["m"]
            self._visit(sys.modules[name], name, names, 0)
        for name, value in known.items():
            if id(value) in self._own:
                self._visit_object(value, self._own[id(value)], names, 0)
            else:
                self._visit(value, name, names, 0)
        values, kinds = self._given
        for value in values:
            self._visit(value, f"an argument of type {type(value).__qualname__}", names, 0)
        for kind in kinds:
            self._visit_class(kind, names, 0)

    def _enter_globals(self, scope: dict[str, Any], used: Collection[str], names: set[str]) -> None:
        label = scope.get("__name__", "globals")
        self._add_variables(Globals(scope, label), used)
        for name in used:
            if name in scope:
                self._visit(scope[name], f"{label}.{name}", names, 0)

    def _add_variables(self, new: Globals, used: Iterable[str]) -> None:
        """Copy some variables of a Python module."""
        holder, values = self.values.setdefault((id(new.owner), type(new)), (new, {}))
        assert isinstance(holder, Globals)
        added = set(used) - holder.names
        holder.names |= added
        values |= {n: v for n, v in holder.read().items() if n in added}

    def _add(self, holder: Holder) -> dict[Hashable, Any]:
        key = id(holder.owner), type(holder)
        if key not in self.values:
            self.values[key] = (holder, holder.read())
        values = self.values[key][1]
        self._known.update(map(id, values.values()))
        return values

    def _visit(self, value: Any, label: str, names: set[str], depth: int) -> None:
        """Follow a reference that the code may follow."""
        if depth > DEEPEST or is_shallow(value) or id(value) in self._now:
            return
        self._now.add(id(value))
        self._known.add(id(value))
        if isinstance(value, types.FunctionType):
            self._visit_function(value, label, names, depth)
        elif isinstance(value, functools._lru_cache_wrapper):
            self.caches.setdefault(id(value), (value, value.cache_info().currsize))
            self._visit(value.__wrapped__, label, names, depth)
        elif isinstance(value, types.MethodType):
            self._visit(value.__func__, label, names, depth + 1)
            self._visit(value.__self__, label, names, depth + 1)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._visit(part, label, names, depth + 1)
        elif isinstance(value, weakref.ref):
            self._visit(value(), label, names, depth + 1)
        elif isinstance(value, types.ModuleType):
            self._visit_module(value, names, depth)
        elif isinstance(value, type):
            self._visit_class(value, names, depth)
        elif isinstance(generator := owner_of(value), GENERATORS):
            self.generators.setdefault(label, (generator, saved_generator(generator)))
        elif hasattr(type(value), "__next__") and (state := iterator_state(value)) is not None:
            self.iterators.setdefault(label, (value, state))
        else:
            self._visit_container(value, label, depth, names)
            self._visit_object(value, label, names, depth)

    def _visit_function(
        self, function: types.FunctionType, label: str, names: set[str], depth: int
    ) -> None:
        inner = names | set(function.__code__.co_freevars)
        if is_own_file(function.__code__.co_filename):  # around a hook of the user's
            for cell in function.__closure__ or ():
                if callable(cell.cell_contents):
                    self._visit(cell.cell_contents, label, names, depth + 1)
            return
        for cell, name in zip(
            function.__closure__ or (), function.__code__.co_freevars, strict=True
        ):
            variable = f"{name} (a variable around {function.__qualname__})"
            for value in self._add(Cell(cell, variable)).values():
                self._visit(value, variable, inner, depth + 1)
        if not is_user_file(function.__code__.co_filename):
            return
        self._add(members_of(function))
        attributes = self._add(Namespace(function, function.__qualname__))
        for key in names & attributes.keys():
            name = f"{function.__qualname__}.{key}"
            self._visit(attributes[key], name, names, depth + 1)
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        for value in defaults:
            self._visit(value, f"a default of {function.__qualname__}", names, depth + 1)

    def _visit_module(self, module: types.ModuleType, names: set[str], depth: int) -> None:
        """Follow the variables of a Python module that the code names."""
        used = names & vars(module).keys()
        if is_user_module(module):
            self._enter_globals(vars(module), used, names)
            return
        self._add_variables(ForeignFunctions(vars(module), module.__name__), used)
        for name in used:
            if isinstance(part := vars(module)[name], types.ModuleType):  # torch.nn.functional
                self._visit(part, name, names, depth + 1)

    def _visit_class(self, kind: Any, names: set[str], depth: int) -> None:
        for base in (*kind.__mro__, *type(kind).__mro__):
            if is_user_module(sys.modules.get(base.__module__)):
                values = self._add(ClassAttributes(base, base.__qualname__))
                for key in names & values.keys():
                    name = f"{base.__qualname__}.{key}"
                    self._visit(values[key], name, names, depth + 1)

    def _visit_object(self, value: Any, label: str, names: set[str], depth: int) -> None:
        """Follow the attributes of an object that the code names."""
        holders = objects_of(value, label)
        if not holders or is_torchs(value):
            return
        if isinstance(value, nn.Module):
            if id(value) in self._own:
                label = self._own[id(value)]
                holders[0] = ModuleAttributes(value, label)
            names = names | REGISTRIES.keys()
        values = {k: v for holder in holders for k, v in self._add(holder).items()}
        if is_collection(value):  # its own code is Python's, which is not watched
            self.names.update(map(str, values))
            names = names | {*map(str, values)}
        if self._unnamed:
            self.whole.add(id(value))
        for key in names & values.keys():
            name = f"{label}.{key}".lstrip(".")
            self._visit(values[key], name, names, depth + 1)
        self._visit_class(type(value), names, depth)
        if isinstance(value, nn.Module):
            self._visit(type(value).forward, f"{type(value).__qualname__}.forward", names, depth)

    def _visit_container(
        self, value: Any, label: str, depth: int, names: set[str] | None = None
    ) -> None:
        """Follow what a container holds."""
        if isinstance(value, (tuple, frozenset)):
            for n, item in enumerate(islice(value, LARGEST_FOLLOWED)):
                self._follow(item, f"{label}[{n}]", names, depth)
            return
        holder = container_of(value, label)
        if holder is None or depth > DEEPEST:
            return
        if isinstance(value, defaultdict):
            self._add(Members(value, label, ("default_factory",)))
        if names is not None:
            self.followed.add(id(value))
        for key, item in islice(self._add(holder).items(), LARGEST_FOLLOWED):
            if isinstance(item, tuple) and key == CONTENT:
                for n, entry in enumerate(item[:LARGEST_FOLLOWED]):
                    self._follow(entry, f"{label}[{n}]", names, depth)
            else:
                self._follow(item, holder.name_of(key), names, depth)

    def _follow(self, value: Any, label: str, names: set[str] | None, depth: int) -> None:
        if names is None:
            self._visit_container(value, label, depth + 1)
        else:
            self._visit(value, label, names, depth + 1)
