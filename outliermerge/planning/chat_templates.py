"""The output's chat template: chosen, tried on a conversation, and written beside the tokenizer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.tokens import load_tokens, token_files
from outliermerge.errors import listing, quoted, shown
from outliermerge.optional import is_installed
from outliermerge.planning.differences import chat_template
from outliermerge.planning.owners import Beside
from outliermerge.planning.plan import Input
from outliermerge.planning.special_tokens import special_token
from outliermerge.planning.tokenizer_plan import ChatTemplate, TokenizerPlan
from outliermerge.spec.chat_templates import AUTO, TEMPLATES
from outliermerge.spec.check import MergeSpec
from outliermerge.storage.files import small_bytes
from outliermerge.storage.json_text import json_bytes
from outliermerge.storage.machine import limited_code

_NUM_SHOWN = 10
JINJA = "chat_template.jinja"
_SECONDS, _BYTES = 5, 400 << 20
_USER, _ANSWER, _SYSTEM, _TOOL = "Which one is it?", "The second one.", "Be brief.", "look_up_word"
_TURNS = (("user", _USER), ("assistant", _ANSWER), ("user", _USER))
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": _TOOL,
            "description": "Looks up a word.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "description": "A word."}},
                "required": ["word"],
            },
        },
    }
]
_MARKER = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?[a-z][a-z_]{0,30}>|\[\|[a-z_]{1,30}\|\]")
# As transformers renders templates: with these settings, functions and blocks, and no others.
_WORKER = f"""
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from datetime import datetime
from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
{limited_code(_SECONDS, _BYTES)}
class Generation(Extension):
    tags = {{"generation"}}
    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body, lineno=line)
def refuse(message):
    raise TemplateError(message)
def as_json(value, **options):
    return json.dumps(value, ensure_ascii=False, indent=options.get("indent"))
environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
environment.filters["tojson"] = as_json
environment.globals["raise_exception"] = refuse
environment.globals["strftime_now"] = lambda form: datetime(2026, 1, 1).strftime(form)
request = json.load(sys.stdin)
answers = []
with limited():
    try:
        template = environment.from_string(request["template"])
        for values in request["values"]:
            try:
                answers.append({{"text": template.render(**values)[:1_000_000]}})
            except Exception as error:
                answers.append({{"error": f"{{error}}"[:1000] or type(error).__name__}})
    except TemplateSyntaxError as error:
        answers = {{"line": error.lineno, "error": error.message}}
print(json.dumps(answers))
"""


def choose_template(
    spec: MergeSpec,
    inputs: Sequence[Input],
    tokenizer: TokenizerPlan | None,
    owner: Input,
) -> tuple[ChatTemplate | None, list[str]]:
    """Return the template that a spec asks for, and notes on it.

    Args:
        tokenizer: what the merge does to the tokenizer.
        owner: the model whose tokenizer the output has.

    Raises:
        SpecError: it is no template, or cannot write a conversation.
    """
    wanted = spec.document.chat_template
    if wanted is None:
        return None, [*_left_behind(owner, inputs)]
    theirs = {entry.reference: _template(entry) for entry in inputs}
    if wanted == AUTO:
        known = Counter(text for text in theirs.values() if text)
        if not known:
            return None, ["`chat_template: auto`: no model has a chat template, none is set"]
        name, text = AUTO, known.most_common(1)[0][0]
    else:
        name, text = (wanted if wanted in TEMPLATES else "inline"), TEMPLATES.get(wanted, wanted)
    same = [reference for reference, own in theirs.items() if own == text.strip()]
    notes = []
    if differing := _conflicts(theirs):
        notes.append(f"the models' chat templates differ, the output has {name}:\n{differing}")
    if not Beside.of(owner).has_tokenizer:
        notes.append(
            f"chat template {name}: {shown(owner.reference)} has no tokenizer, and so has the "
            "output: the template is in a file by itself. `tokenizer: {source: MODEL}` takes a "
            "tokenizer from elsewhere"
        )
    root = owner.tokenizer_home
    files = {path.name: small_bytes(path) for path in token_files(root)}
    tokens = load_tokens(files | dict(tokenizer.files if tokenizer else {}), root) if files else {}
    takes, trial_notes = _try(spec, text, name, root, set(tokens.values()))
    others = [r for r, own in theirs.items() if own and own != text.strip()]
    return ChatTemplate(name, text, tuple(same), tuple(others), takes), [*notes, *trial_notes]


def _left_behind(owner: Input, inputs: Sequence[Input]) -> Iterator[str]:
    """Yield a note if models have chat templates, and the output would have none."""
    if _template(owner) is None and len(inputs) > 1:
        if having := [shown(entry.reference) for entry in inputs if _template(entry)]:
            yield (
                f"the output has no chat template, as {shown(owner.reference)}; "
                f"{', '.join(having)} {'have' if len(having) > 1 else 'has'} one: "
                "`chat_template: auto` gives it to the output"
            )


def _template(entry: Input) -> str | None:
    """Return a model's template, the default one of several."""
    if entry.is_one_file:
        return None
    found = chat_template(Beside.of(entry).files["tokenizer"])
    if isinstance(found, list):  # of named templates
        named = {e.get("name"): e.get("template") for e in found if isinstance(e, dict)}
        found = named.get("default")
    return found.strip() or None if isinstance(found, str) else None


def _conflicts(theirs: Mapping[str, str | None]) -> str:
    """Return which models have which template, if they differ."""
    groups: dict[str | None, list[str]] = {}
    for reference, text in theirs.items():
        groups.setdefault(text, []).append(shown(reference))
    if len(groups) < 2:
        return ""
    return listing(
        f"{', '.join(names)}: "
        + ("none" if text is None else f"one of {len(text):,} characters, {quoted(text, 60)}")
        for text, names in groups.items()
    )


def _try(
    spec: MergeSpec, text: str, name: str, root: Path, tokens: set[str]
) -> tuple[str, list[str]]:
    """Return in words what a template takes, and notes, from writing a short conversation.

    Args:
        root: the folder of the tokenizer, whose special tokens it may write.
        tokens: of the output.

    Raises:
        SpecError: it is no Jinja, or cannot write the conversation.
    """
    if not is_installed("jinja2"):
        return "", ["the chat template is not tried, as Jinja2 is not installed"]
    words = [f"{word}_token" for word in ("bos", "eos", "pad", "unk")]
    special = {w: token for w in words if (token := special_token(root, w)) is not None}
    values = [
        {"messages": turns, "tools": tools, "add_generation_prompt": True, **special}
        for as_parts in (False, True)
        for turns, tools in (
            (_turns(as_parts), None),
            (_turns(as_parts, _SYSTEM), None),
            (_turns(as_parts), _TOOLS),
        )
    ]
    place = ("chat_template",)
    try:
        text.encode()
    except UnicodeEncodeError as lone:
        said = f"{name}: has a lone surrogate, which no file can hold"
        raise spec.source.error(place, said) from lone
    answers = _render(text, values)
    if answers is None:
        raise spec.source.error(
            place, f"{name}: it takes more than {_SECONDS} s or too much memory for three turns"
        )
    if isinstance(answers, dict):
        raise spec.source.error(
            place,
            f"{name}: not valid Jinja: line {answers['line']}: {shown(answers['error'], 400)}",
        )
    good = next((a for a in (answers[:3], answers[3:]) if _USER in a[0].get("text", "")), None)
    if good is None:
        error = answers[0].get("error")
        why = f"fails: {shown(error, 400)}" if error else "does not write what the user says"
        raise spec.source.error(
            place, f"{name}: the template {why} (tried with user, assistant, user)"
        )
    plain, with_system, with_tools = good
    notes = []
    strange = dict.fromkeys(m for m in _MARKER.findall(plain["text"]) if m not in tokens)
    if tokens and strange:
        notes.append(
            f"chat template {name}: it writes {_some(strange)}, for which the "
            "output's tokenizer has no token of its own. `tokenizer: {source: union}` takes tokens "
            "from all models, `tokenizer.tokens` adds them"
        )
    takes = [
        _reaction("a system turn", with_system, _SYSTEM),
        _reaction("tools", with_tools, _TOOL),
    ]
    return ", ".join(takes), notes


def _some(tokens: Collection[str]) -> str:
    first, more = [*map(quoted, tokens)][:_NUM_SHOWN], len(tokens) - _NUM_SHOWN
    return ", ".join(first) + (f" and {more:,} more" if more > 0 else "")


def _reaction(what: str, answer: Mapping[str, str], expected: str) -> str:
    if "error" in answer:
        return f"refuses {what} ({shown(answer['error'])})"
    return f"{'takes' if expected in answer['text'] else 'passes over'} {what}"


def _turns(as_parts: bool, system: str | None = None) -> list[dict[str, Any]]:
    turns = [*([("system", system)] if system else []), *_TURNS]
    return [
        {"role": role, "content": [{"type": "text", "text": said}] if as_parts else said}
        for role, said in turns
    ]


def _render(text: str, values: Sequence[Mapping[str, Any]]) -> Any:
    """Return what a template makes of values, by a process with limits; None if it exceeds them."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _WORKER, json.dumps([p for p in sys.path if p])],
            input=json.dumps({"template": text, "values": values}).encode(),
            capture_output=True,
            timeout=10 * _SECONDS,
            check=False,
        )
        return json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return None


def with_template(files: Mapping[str, bytes | Path], text: str) -> dict[str, bytes]:
    """Return the files of an output that a chat template is written into.

    It goes to every place that has one; else to the tokenizer's config, or to a file of its own.
    """
    changed: dict[str, bytes] = {}
    for name in ("tokenizer_config.json", "chat_template.json"):
        if name not in files:
            continue
        content = files[name]
        value = json.loads(small_bytes(content) if isinstance(content, Path) else content)
        own = value.get("chat_template")
        if own is None and (JINJA in files or name != "tokenizer_config.json"):
            continue
        if isinstance(own, list):  # of named templates
            named = [e for e in own if isinstance(e, dict) and e.get("name") != "default"]
            value["chat_template"] = [{"name": "default", "template": text}, *named]
        else:
            value["chat_template"] = text
        changed[name] = json_bytes(value)
    if JINJA in files or not changed:
        changed[JINJA] = text.encode()
    return changed
