"""What the classes of the parts say of themselves: names, settings, defaults, ranges, and the words of --help.

A part's settings are the parameters of its constructor that have a default and an annotation of `pyrovae.settings`;
what --help says of them are the sentences of its docstring. All of it is read from the sources by `ast`, since
importing the classes would import torch, which takes longer than anybody waits for --help. `Class.load` imports one.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from pyrovae import settings
from pyrovae.errors import UsageError
from pyrovae.settings import Either, Flag, Kind, Number, Several, Whole, Words, close, kind_of, read

ROOT = Path(__file__).parents[1]  # of the package


@dataclass(frozen=True)
class Part:
    """What was chosen for a part of the model, with all its settings; without a name, nothing."""

    name: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.name)

    def plain(self) -> dict[str, Any] | None:
        """As YAML holds it."""
        return {"name": self.name, **self.settings} if self else None


@dataclass(frozen=True)
class Setting:
    """One option: which values it has, what it is when not given, what --help says."""

    kind: Kind
    default: Any
    help: str
    metavar: str | None = None


@dataclass(frozen=True)
class Class:
    """A class, as its source describes it.

    Attributes:
        module: Where it is.
        name: What it is called there.
        help: The first sentence of its docstring, up to a colon.
        settings: What its constructor takes and has a default for.
        takes: What else its constructor takes, by name: the pair's side.
        constants: Class attributes that are plain values: `word`, `short`, `measure`.
    """

    module: str
    name: str
    help: str
    settings: Mapping[str, Setting]
    takes: tuple[str, ...]
    constants: Mapping[str, Any]

    def load(self) -> Any:
        """The class itself."""
        return getattr(importlib.import_module(self.module), self.name)

    def build(self, part: str, settings: Mapping[str, Any], **offered: Any) -> Any:
        """An object of it: what else its constructor takes it finds by name in what is offered.

        Raises:
            UsageError: the constructor refuses a setting, which is named as that of its part.
        """
        try:
            return self.load()(**{name: offered[name] for name in self.takes if name in offered}, **settings)
        except UsageError as error:
            name = str(error).split(":")[0]
            of_setting = name in settings
            raise UsageError(
                f"{part}.{error}" if of_setting else str(error), settings=(f"{part}.{name}",) if of_setting else ()
            ) from error


@dataclass(frozen=True)
class Choice:
    """One choice of a part: a class, or several of one word.

    Of several either the measure of the data decides, or they are an encoder and a decoder with the same settings.
    """

    classes: tuple[Class, ...]

    @property
    def name(self) -> str:
        """What a configuration calls it: the `word` of its class, or the name of its class."""
        found: str = self.classes[0].constants.get("word", self.classes[0].name)
        return found

    @property
    def short(self) -> tuple[str, ...]:
        """What else it may be called."""
        return tuple(self.classes[0].constants.get("short", ()))

    @property
    def help(self) -> str:
        """What --help says."""
        return "; or ".join(cls.help for cls in self.alternatives)

    @property
    def constants(self) -> Mapping[str, Any]:
        """Class attributes that are plain values, of the class that speaks for all."""
        return self.classes[0].constants

    @property
    def alternatives(self) -> tuple[Class, ...]:
        """The classes between which the measure decides; else the one that speaks for all."""
        return self.classes if len({cls.constants.get("measure") for cls in self.classes}) > 1 else self.classes[:1]

    @property
    def measure(self) -> str | None:
        """Of p(x), where all its classes have the same."""
        found = {cls.constants.get("measure") for cls in self.classes}
        return found.pop() if len(found) == 1 else None

    def having(self, key: str, name: str) -> list[tuple[str, Setting]]:
        """A setting of it, by the name of the choice; by those of its classes where they differ in it."""
        found = [(cls.name, cls.settings[key]) for cls in self.alternatives if key in cls.settings]
        alike = len(found) == len(self.alternatives) and all(setting == found[0][1] for _, setting in found)
        return [(name, found[0][1])] if alike else found

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """Those of all its classes; where two have one of the same name, the first one's."""
        return {key: setting for cls in reversed(self.classes) for key, setting in cls.settings.items()}

    def of(self, measure: str) -> Class:
        """Its class for data of a measure.

        Raises:
            UsageError: it has none.
        """
        found = [cls for cls in self.classes if cls.constants.get("measure") in (None, measure)]
        if not found:
            of = " or ".join(dict.fromkeys(str(cls.constants["measure"]) for cls in self.classes))
            raise UsageError(
                f"model={self.name}: is for a {of}, and the rows are of a {measure}; choose a `likelihood` "
                f"that is a {of}, or another model",
                settings=(f"model={self.name}", "likelihood"),
            )
        return found[0]


class Choices(Mapping[str, Choice]):
    """The choices of a part by what a configuration calls them, read from the sources when they are first asked for.

    Args:
        tuples: Modules, and the tuples in them that name the classes; a tuple in one is an encoder and a decoder.
    """

    def __init__(self, *tuples: tuple[str, str]) -> None:
        self.tuples = tuples

    @cached_property
    def found(self) -> dict[str, Choice]:
        """All of them."""
        found: dict[str, Choice] = {}
        for module, name in self.tuples:
            for element in tuple_in(module, name):
                names = element.elts if isinstance(element, ast.Tuple) else [element]
                choice = Choice(tuple(described(module, ast.unparse(name)) for name in names))
                same = found[choice.name].classes if choice.name in found else ()
                found[choice.name] = Choice(same + choice.classes)
        return found

    def __getitem__(self, name: str) -> Choice:
        return self.found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


def option(key: str) -> str:
    """A configuration key as it is typed: latent_dim -> latent-dim."""
    return key.replace("_", "-")


def nearest(word: str, names: list[str]) -> str:
    """What to say about a word that is not among some names."""
    match = close(word, names)
    return f"{word!r} is none of {', '.join(names)}{f'; did you mean {match}?' if match else ''}"


def choose(part: str, value: Any, default: str | None, choices: Mapping[str, Choice]) -> Part:
    """A part: what was given, short names resolved, with the defaults filled in; none, if neither is there.

    Settings whose default is None are left out unless given.

    Raises:
        UsageError: no such choice, or a setting that it does not have, or a value that makes no sense.
    """
    if not isinstance(value, str | Mapping | None):
        raise UsageError(f"{part}: expected a name, or a name and settings, got {value!r}", settings=(part,))
    value = {"name": value} if isinstance(value, str) else dict(value or {})
    name = value.pop("name", None)
    name = default if name is None else name
    if name is None:
        if value:
            key = f"{part}.{next(iter(value))}"
            raise UsageError(f"{key}: say which `{part}` it is for", settings=(key, part))
        return Part()
    names = {word.lower(): full for full, choice in choices.items() for word in (full, *choice.short)}
    if str(name).lower() not in names:
        words = [*choices, *(s for c in choices.values() for s in c.short)]
        raise UsageError(f"{part}: {nearest(str(name), words)}", settings=(part,))
    full = names[str(name).lower()]
    return Part(full, fill(part, full, value, choices[full].settings))


def fill(part: str, name: str, given: Mapping[str, Any], settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Settings of a choice: those given as its values, and the defaults of the others."""
    for key in given:
        if key not in settings:
            used = f"; it has {', '.join(settings)}" if settings else ", which has no settings"
            raise UsageError(f"{part}.{key}: not used by {name}{used}", settings=(f"{part}.{key}",))
    result = {}
    for key, setting in settings.items():
        word = given.get(key)
        value = setting.default if word is None else read(f"{part}.{key}", word, setting.kind)
        if value is not None:
            result[key] = value
    return result


def tuple_in(module: str, name: str) -> list[ast.expr]:
    """The elements of a tuple that a module assigns to a name."""
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            assert isinstance(node.value, ast.Tuple)
            return node.value.elts
    raise LookupError(f"{module}: has no tuple {name}")


@lru_cache
def tree(module: str) -> ast.Module:
    """What a module of this package assigns, imports and declares, without what its functions do."""
    path = ROOT.joinpath(*module.split(".")[1:])
    return ast.parse(outline((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text("utf-8")))


# How the last line of a signature ends: with its body, or what is said to type checkers, or nothing after the colon.
SIGNED = re.compile(r":( \.\.\.)?(\s+#.*)?$")


def outline(source: str) -> str:
    """A source without its functions but for the signatures of constructors: a fifth of it, and as quick to parse."""
    kept, decorators = [], list[str]()
    lines = iter(source.splitlines())
    line = next(lines, None)
    while line is not None:
        start = line.lstrip()
        if start.startswith("@"):
            decorators.append(line)
        elif start.startswith(("def ", "async def ")):
            depth, signature = len(line) - len(start), [line]
            while not SIGNED.search(line):
                signature.append(line := next(lines))
            if start.startswith("def __init__"):
                kept += [*decorators, *signature, " " * depth + " ..."]
            decorators.clear()
            line = next((line for line in lines if line and len(line) - len(line.lstrip()) <= depth), None)
            continue
        else:
            kept += [*decorators, line]
            decorators.clear()
        line = next(lines, None)
    return "\n".join(kept)


def described(module: str, name: str) -> Class:
    """What the source of a class says, in that module or in the one that it is imported from."""
    for node in tree(module).body:
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            return described(str(node.module), name)
        if isinstance(node, ast.ClassDef) and node.name == name:
            docstring = ast.get_docstring(node) or ""
            sentences = arguments(docstring)
            taken = list(parameters(node))
            found = {
                key: setting(key, kind, default, sentences.get(key, ""))
                for key, annotation, default in taken
                if default is not None and (kind := kind_in(module, annotation)) is not None
            }
            takes = tuple(key for key, _, _ in taken if key not in found)
            return Class(module, name, first_sentence(docstring).split(": ")[0], found, takes, dict(constants(node)))
    raise LookupError(f"{module}: has no class {name}")


def parameters(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr | None, ast.expr | None]]:
    """Name, annotation and default of what a class is made from: of its constructor, or of its fields."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            arguments = item.args.args[1:]
            defaults = [None] * (len(arguments) - len(item.args.defaults)) + list(item.args.defaults)
            for argument, default in zip(arguments, defaults, strict=True):
                yield argument.arg, argument.annotation, default
            return
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and not is_class_variable(item.annotation):
                yield ast.unparse(item.target), item.annotation, item.value


def constants(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    """Class attributes that are plain values: `name = value`, or `name: ClassVar[...] = value`."""
    for item in node.body:
        match item:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.expr() as value):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), annotation=kind, value=ast.expr() as value):
                if not is_class_variable(kind):
                    continue
            case _:
                continue
        try:
            yield name, ast.literal_eval(value)
        except ValueError:
            continue


def is_class_variable(annotation: ast.expr) -> bool:
    """Whether an annotation says that a name is the class's own, and no field."""
    return "ClassVar" in ast.unparse(annotation)


def kind_in(module: str, annotation: ast.expr | None) -> Kind | None:
    """What an annotation allows, with the names of `pyrovae.settings` and those that the module gives to such."""
    try:
        return None if annotation is None else kind_of(evaluated(module, annotation))
    except NameError:
        return None


def evaluated(module: str, annotation: ast.expr) -> Any:
    """An annotation as Python would evaluate it; of names, those of settings are known."""
    names = dict(vars(settings))
    used = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)} - names.keys()
    for node in tree(module).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name in used:
                names[name] = evaluated(module, value)
            case ast.ImportFrom(module=str(other)) if other.split(".")[0] == module.split(".")[0]:
                for name in used & {alias.name for alias in node.names}:
                    names[name] = evaluated(other, ast.Name(name, ast.Load(), lineno=1, col_offset=0))
    return eval(compile(ast.Expression(annotation), module, "eval"), names)


def setting(key: str, kind: Kind, default: ast.expr, sentence: str) -> Setting:
    """The option that a constructor's parameter is."""
    value = ast.literal_eval(default)
    value = kind.container(value) if isinstance(kind, Several) else value
    words = kind.names if isinstance(kind, Words) else ()
    if any(word not in sentence for word in words):
        sentence = f"{sentence}: {', '.join(words[:-1])} or {words[-1]}"
    return Setting(kind, value, sentence, metavar(key, kind, value))


def metavar(key: str, kind: Kind, default: Any) -> str:
    """How --help shows the value of an option."""
    if isinstance(kind, Either) and kind.optional and len(kind.kinds) == 1:
        kind = kind.kinds[0]
    if isinstance(kind, Several):
        return shown(default)
    return {Whole: "INT", Number: "NUMBER", Words: "NAME", Flag: "true|false"}.get(type(kind), key.upper())


def shown(value: Any) -> str:
    """A default as it would be typed."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, as it stands within a line of --help."""
    match = re.match(r"(.+?)\.(?:\s|$)", re.sub(r"\s+", " ", text.split("\n\n")[0]))
    sentence = (match[1] if match else text).replace('"', "").replace("`", "")
    return sentence[:1].lower() + sentence[1:] if re.match(r"[A-Z][a-z]+\b|A ", sentence) else sentence


def arguments(docstring: str) -> dict[str, str]:
    """The first sentences of a docstring's section of arguments, by name."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n|\n)*)", inspect.cleandoc(docstring) + "\n", re.M)
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.M)
    return {name: first_sentence(text) for name, text in found}
