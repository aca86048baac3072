"""Read names, bases and arguments of classes from their source, without importing it.

Importing torch and Lightning takes seconds; a command with a wrong word is answered without them.
"""

import ast
import inspect
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

OURS = ("sru", "tasks", "data")
PACKAGES = (*OURS, "torch", "pytorch_lightning", "lightning_fabric")  # those that are slow to import
# Kinds of arguments; only `rescale` of the SRU is bool | str.
KINDS = {"bool": "true or false", "bool | str": "true, false or dropout"}
KINDS |= {"float": "a number", "float | None": "a number"}
MODULES: dict[str, dict[str, Any]] = {}  # the names of each module read so far


@cache
def outline(target: str) -> Any:
    """A class or function with the name, signature and literal attributes of the one at a dotted path.

    None if the source does not tell them all; then the caller must import it. Bases that add no argument are left out.
    """
    module, _, name = target.rpartition(".")
    if target.partition(".")[0] not in PACKAGES or (defined := definition(module, name)) is None:
        return None
    module, node = defined
    if isinstance(node, ast.FunctionDef):
        return None if node.decorator_list else function(node, module)
    methods = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
    # Properties hide a base's attributes.
    content: dict[str, Any] = {name: None for name in methods if name[:2] != "__"}
    for each in node.body:
        if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name) and each.targets[0].id[:2] != "__":
            content[each.targets[0].id] = literal(each.value, module)
    bases = [full_name(base, module) for base in node.bases]
    if "__init__" in methods:
        content["__init__"] = function(methods["__init__"], module)
        bases = [base for base in bases if base.partition(".")[0] in OURS]
    if node.decorator_list or node.keywords or "__new__" in methods or f"{module}.{node.name}" in bases:
        return None
    outlines = [outline(base) for base in bases if base != "abc.ABC"]
    if not all(isinstance(each, type) for each in outlines):
        return None
    content |= {"__module__": module, "__qualname__": node.name}
    return type(node.name, tuple(outlines), content)


def parameters(target: Any) -> dict[str, inspect.Parameter]:
    """The parameters of an outline, a class or a function; a class of this project has those of its bases here too."""
    try:
        found = dict(inspect.signature(target).parameters)
    except ValueError:  # a class written in C has no signature
        return {"options": inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)}
    classes = [c for c in getattr(target, "__mro__", ()) if "__init__" in vars(c)]
    ours = [c for c in classes if c.__module__.partition(".")[0] in OURS]
    if not ours or ours[0] is not classes[0]:
        return found
    for base in ours[1:]:
        for name, parameter in inspect.signature(base).parameters.items():
            if parameter.kind is not parameter.VAR_KEYWORD:
                found.setdefault(name, parameter.replace(default=None))
    # The official package's names for options of the SRU, which its signature does not show.
    for name in getattr(target, "official_options", ()):
        found[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    return {name: parameter for name, parameter in found.items() if parameter.kind is not parameter.VAR_KEYWORD}


def definition(module: str, name: str) -> tuple[str, ast.ClassDef | ast.FunctionDef] | None:
    """The class or function behind a name of a module, with the module that defines it."""
    visited = set()
    while isinstance(node := names(module).get(name), str):
        if node in visited:  # a package that imports its own module
            return None
        visited.add(node)
        module, _, name = node.rpartition(".")
    return (module, node) if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else None


def names(module: str) -> dict[str, Any]:
    """The names of a module: a syntax node for each definition, a dotted path for each import."""
    if module in MODULES:  # incomplete while modules import one another, as in Python
        return MODULES[module]
    known = MODULES[module] = {}
    path = source(module)
    package = module if path and path.name == "__init__.py" else module.rpartition(".")[0]
    try:
        statements = ast.parse(path.read_bytes()).body if path else []
    except (SyntaxError, ValueError):  # the import reports it
        statements = []
    for node in statements:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            known[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            within = package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(filter(None, [within, node.module]))
            every = names(origin) if node.names[0].name == "*" else ()
            known.update({name: f"{origin}.{name}" for name in every})
            known.update({alias.asname or alias.name: f"{origin}.{alias.name}" for alias in node.names})
        elif isinstance(node, ast.Import):
            first = {alias.name.partition(".")[0] for alias in node.names if not alias.asname}
            known.update({name: name for name in first} | {a.asname: a.name for a in node.names if a.asname})
        elif isinstance(node, ast.Assign):
            known.update({ast.unparse(target): node.value for target in node.targets})
    return known


@cache
def source(module: str) -> Path | None:
    """The file of a module. Nothing is imported; importlib.util.find_spec would import the enclosing packages."""
    package, places = "", None
    for part in module.split("."):
        package = f"{package}.{part}".lstrip(".")
        spec = PathFinder.find_spec(package, places)
        if spec is None:
            return None
        places = spec.submodule_search_locations
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def full_name(node: ast.expr, module: str) -> str:
    """The dotted path of a base class, resolved by the imports of its module."""
    if isinstance(node, ast.Subscript):  # Generic[T]
        node = node.value
    first, dot, rest = ast.unparse(node).partition(".")
    known = names(module).get(first)
    return f"{known if isinstance(known, str) else f'{module}.{first}'}{dot}{rest}"


def function(node: ast.FunctionDef, module: str) -> Any:
    """An empty function with the same arguments; of the annotations it keeps KINDS, and every default is None."""
    args = node.args
    for argument in filter(None, (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg)):
        if argument.annotation and ast.unparse(argument.annotation) not in KINDS:
            argument.annotation = None
    args.defaults = [ast.Constant(None) for _ in args.defaults]
    args.kw_defaults = [default and ast.Constant(None) for default in args.kw_defaults]
    stub = ast.FunctionDef(node.name, args, [ast.Pass()], [], lineno=0, col_offset=0)
    content: dict[str, Any] = {"__name__": module}
    exec(compile(ast.fix_missing_locations(ast.Module([stub], [])), module, "exec"), content)
    return content[node.name]


def literal(node: ast.expr, module: str) -> Any:
    """The value of a literal, or of a name that is assigned one; None for other expressions."""
    value = names(module).get(node.id) if isinstance(node, ast.Name) else node
    try:
        return ast.literal_eval(value) if isinstance(value, ast.expr) else None
    except ValueError:
        return None
