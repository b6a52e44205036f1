"""The options of a method as inputs, made from the fields of its config dataclass, with their help texts.

There is one input per option name of any method; those that the chosen method lacks are hidden. So the page and its API
have a fixed list of inputs, and a new method brings its own.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from hf_epimer import METHODS, EpimerError, Option

DEFAULT_METHOD = "epimer"
PLAIN = ("rank", "alpha")
"""Options that are always in sight; the others are folded away."""


def all_options() -> dict[str, Option]:
    """Every option of any method, as the first method that has it describes it; those always in sight first."""
    options: dict[str, Option] = {}
    for method in (DEFAULT_METHOD, *METHODS):
        for name, option in METHODS[method].options.items():
            options.setdefault(name, option)
    return {name: options[name] for name in sorted(options, key=lambda name: name not in PLAIN)}


def option_inputs(names: list[str]) -> list[Any]:
    """Inputs for some options, as the default method has them."""
    made: list[Any] = []
    options = METHODS[DEFAULT_METHOD].options
    for name in names:
        option = options.get(name) or all_options()[name]
        label = name.replace("_", " ").capitalize()
        shown = {"label": label, "visible": name in options, "min_width": 140, **_settings(option)}
        if option.choices:
            made.append(gr.Radio(**shown))
        elif option.optional:  # an empty number would have to be given by every client of the API
            made.append(gr.Textbox(**{**shown, "value": ""}))
        else:
            made.append(gr.Number(**shown))
    return made


def described_options() -> str:
    """A line for each, with the methods that have it, for the docstring of an endpoint."""
    lines = []
    for name, option in all_options().items():
        owners = ", ".join(method.name for method in METHODS.values() if name in method.options)
        lines.append(f"{name} ({option.help}; of {owners}).")
    return "\n".join(lines) + "\n"


def shown_for(method: str) -> list[Any]:
    """Updates of all inputs, in the order of `all_options`, and of the fold of those not always in sight."""
    options = METHODS[method].options
    updates: list[Any] = [
        gr.update(visible=True, **_settings(options[name])) if name in options else gr.update(visible=False)
        for name in all_options()
    ]
    return [*updates, gr.update(visible=any(name not in PLAIN for name in options))]


def chosen_options(method: str, values: dict[str, Any]) -> dict[str, Any]:
    """The method's options from the inputs; an empty number is None, where the option may be that.

    Raises:
        EpimerError: an unknown method, or a number is missing.
    """
    if method not in METHODS:
        raise EpimerError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
    options = {}
    for name, option in METHODS[method].options.items():
        value = values.get(name, option.default)
        options[name] = value if option.choices else _number(option, value)
    return options


def _number(option: Option, value: Any) -> float | int | None:
    name = option.name.replace("_", " ")
    if value in (None, ""):
        if option.optional:
            return None
        raise EpimerError(f"{name} is empty: give a number, such as {option.default:g}")
    try:
        number = float(value)
    except ValueError:
        raise EpimerError(f"{name}: {value!r} is not a number") from None
    return int(number) if option.kind is int and number.is_integer() else number


def _settings(option: Option) -> dict[str, Any]:
    """What the input shows for this method."""
    bounds = {"choices": list(option.choices)} if option.choices else {"placeholder": "automatic"}
    return {"value": option.default, "info": option.help[:1].upper() + option.help[1:], **bounds}
