"""Templates that would take all time or memory are refused, in seconds; others are let through."""

import time

import pytest
from chat_templates import TEMPLATES
from jinja2 import lexer

from medusa_exp.data import template_probe

LOOPS = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
DOUBLED = (
    "{% set ns = namespace(x='a') %}"
    "{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LOOPS, "is not over after"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", None),
        ("{{ 'a' * 10**9 }}", "takes more memory"),
        ("{{ 'a' * 10**7 }}", "it makes 10,000,000 characters"),
        ("{{ 10 ** (10 ** 8) }}", "is not over after|more memory"),
        ("{{ '%1000000000d' % 1 }}", "takes more memory"),
        ("{{ ''.rjust(10**9) }}", "takes more memory"),
        ("{{ lipsum(n=10**7) }}", "is not over after|more memory"),
        (DOUBLED, "is not over after|more memory"),
        ("{{ raise_exception('no') }}", None),
        ("{{ messages[0].content }}", None),
        ("{{ 1 }}" * 50_000, "it has 350,000 characters"),
        ("{% if", None),
    ],
)
def test_what_takes_all_time_or_memory_is_refused(template, said, monkeypatch):
    monkeypatch.setattr(template_probe, "SECONDS_OF_PROCESSOR", 1)
    template_probe.refusal.cache_clear()
    start = time.perf_counter()
    found = template_probe.refusal(template)
    assert time.perf_counter() - start < 10
    if said is None:
        assert found is None
    else:
        assert found is not None and any(words in found for words in said.split("|"))


def test_templates_of_models_are_let_through():
    assert [name for name, text in TEMPLATES.items() if template_probe.refusal(text.source)] == []


def test_what_other_threads_hold_keeps_no_template_waiting():
    """They may be rendering: a fork of this process would have their locks as well."""
    with lexer._lexer_cache._wlock:
        assert template_probe.refusal("{{ messages[0].content }} while a thread renders") is None
