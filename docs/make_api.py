"""Write docs/api.md, the reference of both modules, from their docstrings.

    python docs/make_api.py             # after a change of a docstring or a signature
    python docs/make_api.py --check     # exit status 1 if the page is out of date

Only the standard library and the two modules. Public is what `__all__` lists, and of those classes what begins with no
underscore. What minipool passes on from the standard library is named, not repeated.
"""

import inspect
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import minipool  # noqa: E402
import minipool_worker  # noqa: E402

PAGE = ROOT / "docs/api.md"
CONSTRUCTED = (minipool.Executor, minipool.Server, minipool_worker.Node)    # what users make themselves
HEAD = """# API reference

What `from minipool import *` gives, and `minipool_worker` beside it: made from the docstrings by
`python docs/make_api.py`. [README](../README.md) shows how it is used, [tuning.md](tuning.md) what the options are for.
Files of `examples/` explain themselves at their top.
"""


class Text(str):
    """A default value that is shown as it is written in the source."""
    __repr__ = str.__str__


def signature(name, fn, width=110):
    """Return a call as it is written in a definition, on one line or with an argument a line."""
    call = inspect.signature(fn)
    arguments = [argument.replace(default=Text("os.environ")) if argument.default is os.environ else argument
                 for argument in call.parameters.values() if argument.name != "self"]
    result = "" if call.return_annotation is call.empty else call.return_annotation
    call = call.replace(parameters=arguments, return_annotation=inspect.Signature.empty)
    text = re.sub(r": '([^']*)'", r": \1", f"{name}{call}") + (f" -> {result}" if result else "")
    if len(text) <= width:
        return text
    inside = re.sub(r", (?=\w+:|\*)", ",\n    ", text[len(name) + 1 : text.rindex(")")])
    return f"{name}(\n    {inside}\n){text[text.rindex(')') + 1:]}"


def prose(thing):
    """Return a docstring as paragraphs."""
    text = inspect.cleandoc(thing.__doc__ or "")
    return re.sub(r"(?<!`)\b\w+\(\*args, \*\*kwargs\)", r"`\g<0>`", text)     # else its stars are emphasis


def entry(title, thing, call=""):
    """Return a heading with its signature and its docstring."""
    code = f"```python\n{call}\n```\n\n" if call else ""
    return f"{title}\n\n{code}{prose(thing)}\n"


def members(cls):
    """Yield the entries of a class's own public methods and properties, in the order of the source."""
    for name, thing in vars(cls).items():
        if name.startswith("_"):
            continue
        if isinstance(thing, property):
            yield entry(f"#### `{cls.__name__}.{name}`", thing)
        elif inspect.isfunction(thing) and thing.__name__ == name:
            yield entry(f"#### `{cls.__name__}.{name}()`", thing, signature(name, thing))
        elif inspect.isfunction(thing):
            yield f"#### `{cls.__name__}.{name}()`\n\nAnother name of `{thing.__name__}`.\n"


def name_of(base):
    """Return a class's name, with its package if it is neither ours nor built in."""
    package = base.__module__.replace("concurrent.futures._base", "concurrent.futures")
    return base.__name__ if package in ("builtins", "minipool", "minipool_worker") else f"{package}.{base.__name__}"


def describe(name, thing):
    """Yield the entries of one public name."""
    if not getattr(thing, "__module__", "").startswith("minipool"):
        yield (f"### `{name}()`\n\nThe standard library's, which takes these futures as its own: see\n"
               f"[its page](https://docs.python.org/3/library/concurrent.futures.html#concurrent.futures.{name}).\n")
    elif inspect.isclass(thing):
        bases = ", ".join(f"`{name_of(base)}`" for base in thing.__bases__ if base is not object)
        call = signature(name, thing.__init__) if thing in CONSTRUCTED else ""
        call = re.sub(r" -> None$", "", call)
        yield entry(f"### `{name}`" + (f" ({bases})" if bases else ""), thing, call)
        if not issubclass(thing, Exception):
            yield from members(thing)
    else:
        yield entry(f"### `{name}()`", thing, signature(name, thing))


def page():
    """Return the text of docs/api.md."""
    parts = [HEAD]
    for module in (minipool, minipool_worker):
        parts.append(f"## `{module.__name__}`\n\n{prose(module).splitlines()[0]}\n")
        for name in module.__all__:
            parts += describe(name, getattr(module, name))
    return "\n".join(parts)


def main():
    if sys.argv[1:] == ["--check"]:
        return PAGE.read_text(encoding="utf-8") != page()
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
