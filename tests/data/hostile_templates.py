"""Chat templates that try to run code, to read files, to fill memory, or never to end; and mutations of sound ones."""

from __future__ import annotations

import random

ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in 'ab' %}{% endfor %}{% endfor %}{% endfor %}",
    "{% set x = namespace(s='ab') %}{% for i in range(60) %}{% set x.s = x.s ~ x.s %}{% endfor %}{{ x.s | length }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ 7 ** (7 ** 9) }}",
    "{{ (range(99999) | list * 99) | join | length }}{% for a in range(9999) %}{{ range(99999) | sum }}{% endfor %}",
    "{% for a in range(99999) %}{{ messages | tojson }}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{{ ('a' * 99999) | replace('a', 'a' * 9) | upper | length }}{% endfor %}",
    "{{ lipsum(n=99999, min=999, max=99999) }}",
    "{{ cycler(*range(99999)).next() }}{% for a in range(99999) %}{{ range(99999) | random }}{{ range(99999) | list }}"
    "{% endfor %}",
    "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{{ ('a' * 600) | wordwrap(1) | indent(999) | length }}{% for a in range(9999) %}{{ 9 ** 99999 % 7 }}{% endfor %}",
    "{{ 9 ** 9999999 }}",
]
LARGE = [
    "{{ 'a' * 10 ** 9 }}",
    "{{ 'a' * 10 ** 18 }}",
    "{{ [0] * 10 ** 9 }}",
    "{{ range(10 ** 9) | list }}",
    "{{ 'x' | center(10 ** 9) }}",
    "{{ 'x'.ljust(10 ** 9) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ 'x'.zfill(10 ** 9) }}",
    "{{ '%*d' % (10 ** 9, 1) }}",
    "{{ 'a\n' * 10 ** 6 | indent(10 ** 6) }}",
    "{{ ('a,' * 10 ** 7).split(',') | batch(2) | list | length }}",
    "{{ 'ab'.encode('utf-8') * 10 ** 9 }}",
    "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "{{ messages | tojson(indent=10 ** 9) }}",
    "{{ 'a'.expandtabs(10 ** 9) ~ '\t'.expandtabs(10 ** 9) }}",
    "{{ (1).__lshift__(10 ** 10) if false else 2 ** 10 ** 10 }}",
    "{{ 'x' | truncate(10 ** 9) }}{{ ['a'] * 10 ** 8 | join('b' * 100) }}",
    "{{ dict.fromkeys(range(99999), 'a' * 10 ** 9) }}",
    "{{ 'a' | urlize(trim_url_limit=10 ** 9) * 10 ** 9 }}",
]
DEEP = [
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "{{ " + "-" * 20000 + "1 }}",
    "{{ " + "not " * 20000 + "1 }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{% for a in 'a' %}" * 300 + "{% endfor %}" * 300,
    "{{ 1" + " + 1" * 30000 + " }}",
    "{{ a" + ".a" * 30000 + " }}",
    "{{ a" + "|e" * 20000 + " }}",
    "{% set x = namespace() %}{% set x.x = x %}{{ x | tojson }}{{ [messages] | tojson }}",
    "{% set x = [] %}{{ x.append(x) }}{{ x }}",
]
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__base__'] }}",
    "{{ '' | attr('__class__') | attr('__mro__') }}",
    "{{ self.__init__.__globals__.__builtins__.open('/etc/passwd').read() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['os'].system('touch CANARY') }}",
    "{{ strftime_now.__closure__[0].cell_contents }}",
    "{{ strftime_now.__globals__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(strftime_now) }}",
    "{{ ('{0.__cl' ~ 'ass__}').format_map({'0': lipsum}) }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f(1) }}",
    "{{ ['{0.__class__}'] | map('format', 1) | list }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages | groupby('__class__') }}",
    "{{ [lipsum] | map(attribute='__globals__') | list }}",
    "{{ [{}] | sort(attribute='__class__.__init__') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "{% extends '/etc/passwd' %}",
    "{% from '/etc/passwd' import x %}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ messages.__iadd__([1]) }}",
    "{{ ''.__init_subclass__.__self__ }}",
    "{{ dict.__class__.__subclasses__() }}",
    "{% set n = namespace(__class__=1) %}{{ n.__class__ }}",
    "{% set n = namespace() %}{% set n._x = 1 %}{{ n }}",
    "{{ (lipsum | string) ~ (namespace | pprint) ~ self ~ loop ~ caller ~ varargs }}",
    "{{ request.application.__globals__.__builtins__.__import__('os').system('touch CANARY') }}",
    "{% generation %}{{ ''.__class__ }}{% endgeneration %}",
    "{{ messages | xmlattr }}{{ {'a\"b': 1} | xmlattr }}",
    "{{ 'x'.encode('idna') }}{{ 'x'.encode('rot13') }}{{ '\\x00' }}",
    "{{ '\\ud800' }}",
    "{{ g.gi_frame.f_globals }}{{ (messages | map('upper')).gi_frame.f_back.f_globals }}",
    "{{ (messages | map('list')).gi_code }}",
]
BROKEN = [
    "{% generation %}", "{% endgeneration %}", "{% for %}", "{{", "{% if %}{% endfor %}", "{{ a b }}", "{%", "{#",
    "{{ }}", "", "{% unknown %}", "{{ x | nofilter }}", "{{ x is notest }}", "{% break %}", "{{ undefined.x.y }}",
    "{{ 1 / 0 }}",
    "{{ raise_exception('\\n\\x1b[31mno') }}", "{{ raise_exception(1, 2, 3) }}", "{{ raise_exception('a' * 10 ** 7) }}",
    "{{ strftime_now('%' * 10 ** 5) }}", "{{ strftime_now(7) }}", "{{ messages }}", "{{ {}[[]] }}",
]  # fmt: skip
SOUND = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<' + message['content'] + '>>' }}"
    "{% elif message.role == 'user' %}{{ '[' + message.content.strip() + ']' }}{% else %}{% generation %}"
    "{{ message.content | trim ~ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '>' }}{% endif %}"
)
_PIECES = [
    "{{", "}}", "{%", "%}", "{#", "#}", "for ", " in ", "if ", "endif", "endfor", "range(9999)", "10 ** 9", "**", "*",
    "'", '"', "(", ")", "[", "]", ".__class__", "|", "~", "%", "generation", "endgeneration", "macro f()", "endmacro",
    "f()", "self", "messages", "loop", "namespace()", "set x = ", "block b", "endblock", "raise_exception('x')", "\n",
    "\\x00", "-", "1",
]  # fmt: skip


def mutations(count: int, seed: int) -> list[str]:
    """Sound templates and attacks, cut, doubled and mixed."""
    chance, sources = random.Random(seed), [SOUND, *ENDLESS[:4], *LARGE, *ESCAPES]
    made = []
    for _ in range(count):
        text = chance.choice(sources) if chance.random() < 0.5 else SOUND
        for _ in range(chance.randint(1, 6)):
            begin, end = sorted(chance.choices(range(len(text) + 1), k=2))
            part = chance.choice([*_PIECES, text[begin : begin + 40], chance.choice(sources)])
            text = text[:begin] + part + text[min(end, begin + chance.choice([0, 0, 3, 20])) :]
        made.append(text)
    return made
