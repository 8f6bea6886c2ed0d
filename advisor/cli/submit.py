"""`advisor submit`: give the service a model, or a recorded window of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from advisor.cli import options, output
from advisor.cli.numbers_text import count
from advisor.errors import InvalidModel

# safetensors' own limit; eight characters of any text, read as a length, are far above it.
LARGEST_HEADER_BYTES = 100_000_000
PARTS = ("config", "data", "training")  # of a description: the settings


def submit(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="A description (.json or .toml: name, family, config, data, training), or a window file that "
            "`window.save` wrote (then --name is the model's).",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model; default: the family.", show_default=False)
    ] = None,
    family: Annotated[str | None, typer.Option(help="Built-in family: gpt or convnet.", show_default=False)] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Built-in data: python-text or digits; default: the family's.", show_default=False),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="One setting, e.g. config.layers=2 or training.seed=1. May be repeated."),
    ] = None,
    url: options.Url = options.DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """Submit a model to the service: a built-in family with its data, or a recorded window file."""
    from advisor.client import connect

    content = None if file is None else file.read_bytes()
    with connect(url) as client:
        if file is not None and content is not None and is_window_file(file, content):
            if name is None or family or data or setting:
                raise typer.BadParameter("a window file goes with --name alone", param_hint="FILE")
            window = client.push(content, model=name)
            if as_json:
                output.print_json(window)
                return
            output.console().print(
                f"{window['id']}: {len(window['steps'])} steps of {window['sites']} sites, model {name!r}"
            )
            return
        description = {} if file is None or content is None else read_description(file, content)
        model = client.submit(_filled(description, name, family, data, setting))
    if as_json:
        output.print_json(model)
        return
    output.console().print(
        f"{model['name']} ({model['id']}): {model['family']}, {count(model['parameters'])} parameters"
    )
    output.console().print(f"next: advisor probe {model['name']}")


def is_window_file(path: Path, content: bytes) -> bool:
    """Whether it begins as safetensors does (the header's length in eight bytes, then JSON), or is named so."""
    header_bytes = int.from_bytes(content[:8], "little")
    return path.suffix == ".safetensors" or (content[8:9] == b"{" and header_bytes <= LARGEST_HEADER_BYTES)


def read_description(path: Path, content: bytes) -> dict[str, Any]:
    """The dict in a .json or .toml file of this content. Raises InvalidModel."""
    import tomllib

    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidModel(
            f"{path} is neither a window file nor text in UTF-8 (byte {error.start} is 0x{content[error.start]:02x}); "
            "a description in JSON or TOML, or what `window.save` wrote, is expected"
        ) from error
    try:
        found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise InvalidModel(f"{path} is not {kind}: {error}") from error
    if not isinstance(found, dict):
        raise InvalidModel(f"{path} holds a {type(found).__name__}; an object with name, family, config is expected")
    for part in PARTS:
        if not isinstance(found.get(part, {}), dict):
            raise InvalidModel(f"{path}: {part} is {found[part]!r}; settings by name are expected, or leave it out")
    try:
        json.dumps(found)
    except TypeError as error:
        raise InvalidModel(f"{path} holds a date or a time, which no setting is: {error}") from error
    return found


def _filled(
    description: dict[str, Any], name: str | None, family: str | None, data: str | None, setting: list[str] | None
) -> dict[str, Any]:
    """The description with what the options say. A usage error where no family is named."""
    filled = json.loads(json.dumps(description))
    if family is not None:
        filled["family"] = family
    if "family" not in filled:
        raise typer.BadParameter("give a FILE, or a family: --family gpt or --family convnet", param_hint="--family")
    filled["name"] = name or filled.get("name") or filled["family"]
    if data is not None:
        filled["data"] = {"set": data}
    for place, value in options.pairs(setting, "--set").items():
        part, dot, key = place.partition(".")
        if part not in PARTS or not dot or not key:
            raise typer.BadParameter(f"{place!r} is not config.…, data.… or training.…", param_hint="--set")
        filled.setdefault(part, {})[key] = _value(value)
    return filled


def _value(text: str) -> Any:
    """A number, true, false, null or list where the text is JSON; else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
