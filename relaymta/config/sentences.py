"""What is wrong with a file, in the words of who writes it: errors of pydantic as `file:line: key: what`. (Those of TOML:
relaymta/toml.py.)"""

import re
from typing import Any

from pydantic import BaseModel, ValidationError

from relaymta.config.origin import Origin
from relaymta.config.values import Place, Problems, is_list, model_of, near

__all__ = ["problems_of"]

_UNION = re.compile(r"constrained-str\Z|(function-(before|after)|literal)\[")  # pydantic's names for the types of a union
_OPTION = re.compile(r"'([^']*)'")
_SHOWN = 60  # characters of a wrong value

# Errors of pydantic about values of another type.
_TYPES = {
    "string_type": "a text: write it in quotes",
    "int_type": "a whole number, without quotes",
    "int_from_float": "a whole number",
    "float_type": "a number, without quotes",
    "bool_type": "true or false, without quotes",
    "list_type": "a list: write it in brackets",
}


def problems_of(model: type[BaseModel], origin: Origin, error: ValidationError) -> list[str]:
    """Pydantic's errors as our problems: `file:line: key: what`."""
    entries = [single for entry in error.errors() for single in _singly(entry)]
    explained = {_place(entry) for entry in entries if entry["type"] != "literal_error"}
    return [
        _problem(model, origin, entry)
        for entry in entries
        if entry["type"] != "literal_error" or _place(entry) not in explained  # of a union whose other type says more
    ]


def _place(entry: Any) -> Place:
    return tuple(part for part in entry["loc"] if not _UNION.match(str(part)))


def _singly(entry: Any) -> list[Any]:
    """The errors in an error of pydantic's, which may be about several keys."""
    problems = entry.get("ctx", {}).get("error")
    if not isinstance(problems, Problems):
        return [entry]
    return [
        {"type": "value_error", "loc": (*entry["loc"], *place), "msg": what, "other": other}
        for place, what, other in problems.found
    ]


def _problem(model: type[BaseModel], origin: Origin, entry: Any) -> str:
    place = _place(entry)
    given = entry.get("input")
    what = re.sub(r"^Value error, ", "", entry["msg"])
    if entry["type"] == "extra_forbidden":
        what = "no such key" + _did_you_mean(model, place)
    elif entry["type"] == "missing":
        what = "is missing"
    elif entry["type"] == "list_type" and model_of(_annotation(model, place)) is not None:
        what = f"write [[{_name(place)}]] in double brackets: there can be several"
    elif entry["type"] == "list_type" and isinstance(given, dict):
        what = f'a list, not a table: write {place[-1]} = ["A", "B"]'
    elif entry["type"] == "string_type" and isinstance(given, dict | list):
        what = f"a text, not a {'table' if isinstance(given, dict) else 'list'}"
    elif entry["type"] == "model_type" and not isinstance(given, dict):
        single = "write [{}] in single brackets: there is one" if isinstance(given, list) else "a table: write [{}]"
        what = ("tables: write [[{}]] for each" if isinstance(place[-1], int) else single).format(_name(place))
    elif entry["type"] == "dict_type":
        what = f'a table: write {place[-1]} = {{ NAME = "VALUE" }}' + _shown(given, "")
    elif entry["type"] == "greater_than":
        what = f"must be more than {entry['ctx']['gt']:g}" + _shown(given, "0")
    else:
        what = _TYPES.get(entry["type"], what) + _shown(given, what)
        if entry["type"] == "literal_error":
            what += near(str(given), _OPTION.findall(entry["ctx"]["expected"]))
    return origin.sentence(place, what, entry.get("other", ()))


def _name(place: Place) -> str:
    return ".".join(part for part in place if isinstance(part, str))


def _annotation(root: type[BaseModel], place: Place) -> Any:
    """The type of a key; of a value in a list: that of the list."""
    annotation: Any = root
    for part in place:
        if isinstance(part, str):
            model = model_of(annotation)
            assert model is not None
            annotation = model.model_fields[part].annotation
    return annotation


def _shown(given: object, what: str) -> str:
    """` (it is ...)`, unless a sentence says that already."""
    if not isinstance(given, str | int | float | bool) or given == "":
        return ""
    if repr(given) in what or (isinstance(given, str) and len(given) > 3 and given in what):
        return ""
    shown = repr(given)
    return f" (it is {shown if len(shown) <= _SHOWN else shown[: _SHOWN - 4] + ' ...'})"


def _did_you_mean(root: type[BaseModel], place: Place) -> str:
    model: Any = model_of(_annotation(root, place[:-1]))
    name = str(place[-1])
    of_root = len(place) > 1 and name in root.model_fields
    if of_root and model_of(root.model_fields[name].annotation) is None:
        return f": {name} stands in front of the first table"
    meant = near(name, model.model_fields)
    if meant or of_root:
        return meant
    tables = [(table, field.annotation, model_of(field.annotation)) for table, field in root.model_fields.items()]
    known = [
        f"[[{table}]]" if is_list(annotation) else f"[{table}]"
        for table, annotation, below in tables
        if below is not None and below is not model and name in below.model_fields
    ]
    return f" (it is a key of {' and '.join(known)})" if 0 < len(known) <= 3 else ""
