"""`gateway.toml`: the shipped file shows every key with its default, and mistakes are told all at once with their places."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from tidegate.gateway.config import Config, ConfigError, Listener, load
from tidegate.gateway.config_keys import KEYS, LATER_KEYS, LISTENER_KEYS, NEVER
from tidegate.gateway.config_places import SYSTEM_CONF, default_data, find_config

from tests.support.rights import as_user, needs_root, seen_by_others

SHIPPED = Path(__file__).resolve().parents[2] / "conf" / "gateway.toml"
DESIGN = """
[gateway]
name = "barn-7"
data = "/var/lib/tidegate"
[[listener]]
bind = "127.0.0.1:1883"
allow_anonymous = true
[access]
password_file = "passwd"
[store]
durability = "full"
commit_delay = "0ms"
disk_budget = "1GiB"
[uplink]
backends = ["sqlite", "redis"]
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "gateway.toml"
    path.write_text(text)
    return path


def mistakes(tmp_path: Path, text: str, environ: dict[str, str] | None = None, listen: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with the file, without the directory in front."""
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, text), None, listen, environ or {})
    return [str(mistake).removeprefix(f"{tmp_path}/") for mistake in caught.value.mistakes]


# -- http, and what is warned of -------------------------------------------------------------------------------------


def test_http_is_off_until_an_address_is_given(tmp_path: Path) -> None:
    assert load(None, tmp_path, (), {}).http is None
    config = load(written(tmp_path, "[http]\nbind = '127.0.0.1:9883'\n"), tmp_path, (), {})
    assert (config.http, config.warnings) == (("127.0.0.1", 9883), ())


def test_http_for_others_is_warned_of(tmp_path: Path) -> None:
    config = load(None, tmp_path, (), {"TIDEGATE_HTTP__BIND": "0.0.0.0:9883"})
    assert config.http == ("0.0.0.0", 9883)
    (warning,) = config.warnings
    assert "whoever reaches it can read health and metrics, without a password" in warning


# -- the shipped file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "retained", "told"), [("64MiB", "0", False), ("64MiB", "20MiB", False), ("64MiB", "40MiB", True)]
)
def test_what_no_trim_may_take_is_told_when_it_could_break_the_disk_budget(
    tmp_path: Path, budget: str, retained: str, told: bool
) -> None:
    text = f'[store]\ndisk_budget = "{budget}"\n[limits]\nmax_retained_bytes = "{retained}"\n'
    file = tmp_path / "gateway.toml"
    file.write_text(text)
    config = load(file, environ={})
    assert [("more than half of store.disk_budget (64 MiB)" in warning) for warning in config.warnings] == [True] * told


def test_the_shipped_file_shows_every_key_and_no_other() -> None:
    text = re.sub(r"^# (\w+ = .*)$", r"\1", SHIPPED.read_text(), flags=re.MULTILINE)
    shown = tomllib.loads(text)
    listeners = shown.pop("listener")
    assert {section: set(table) for section, table in shown.items()} == {s: set(keys) for s, keys in KEYS.items()}
    assert [set(table) for table in listeners] == [set(LISTENER_KEYS)]


def test_the_shipped_file_shows_the_defaults() -> None:
    shipped, built_in = load(SHIPPED, Path("/data"), (), {}), load(None, Path("/data"), (), {})
    differing = {name for name in Config.__slots__ if getattr(shipped, name) != getattr(built_in, name)}
    assert differing == {"file", "conf_dir"}


def test_every_key_of_the_shipped_file_has_a_comment_above() -> None:
    lines = SHIPPED.read_text().splitlines()
    bare = []
    for number, line in enumerate(lines):
        if re.match(r"(# )?\w+ = ", line) and not lines[number - 1].startswith(("#", "max_", "[[")):
            bare.append(line)
    assert not bare


def test_the_designs_example_loads(tmp_path: Path) -> None:
    config = load(written(tmp_path, DESIGN), None, (), {})
    assert (config.name, config.data, config.backends) == ("barn-7", Path("/var/lib/tidegate"), ("sqlite", "redis"))
    assert config.password_file == tmp_path / "passwd"
    assert config.listeners == (Listener("127.0.0.1", 1883, True),)
    assert (config.disk_budget, config.commit_delay, config.session_expiry) == (1 << 30, 0.0, NEVER)


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_all_mistakes_are_told_at_once_with_line_and_nearest_name(tmp_path: Path) -> None:
    text = (
        "[gatewy]\nname = 'x'\n"
        "[store]\ndurabilty = 'full'\ncommit_delay = '2s'\ndisk_budget = 'lots'\n"
        "[limits]\nmax_inflight = 0\n"
        "[[listener]]\nbind = '1883'\n"
        "[[listener]]\nbind = '127.0.0.1:1884'\nalow_anonymous = true\n"
        "[uplink]\nbackends = ['sqlite', 'reddis']\n"
    )
    assert mistakes(tmp_path, text) == [
        "gateway.toml:1: unknown section [gatewy]: did you mean gateway?",
        "gateway.toml:4: unknown key 'durabilty' in [store]: did you mean durability?",
        """gateway.toml:5: store.commit_delay = '2s': allowed is a time from "0ms" to "100ms\"""",
        "gateway.toml:6: store.disk_budget = 'lots': allowed is a size from 16777216 to 1125899906842624 bytes, "
        'such as "64MiB" or "1GiB"',
        "gateway.toml:8: limits.max_inflight = 0: allowed is a whole number from 1 to 65535",
        "gateway.toml:10: listener.bind = '1883': allowed is HOST:PORT with a port from 0 to 65535, such as 127.0.0.1:1883, "
        "0.0.0.0:1883 or [::]:1883",
        "gateway.toml:13: unknown key 'alow_anonymous' in [[listener]]: did you mean allow_anonymous?",
        "gateway.toml:15: uplink.backends = ['sqlite', 'reddis']: allowed is sqlite, redis, mysql, pgsql "
        "(nearest to 'reddis': redis)",
    ]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[store\n", 1, "is not TOML"),
        ("x = " + "[" * 100_000, 0, "too many brackets inside one another"),
        (f"[limits]\nmax_inflight = {'9' * 5000}\n", 0, "a number with too many digits"),
        ("[store]\ndurability = full\n", 2, "is not TOML"),
        ("[store]\ndurability = ", 2, "is not TOML"),
        ("durability = 'full'\n", 1, "belongs into a section"),
        ("[store]\ndurability = 'ful'\n", 2, "full | normal | memory (nearest: full)"),
        ("[store]\ndurability = true\n", 2, "full | normal | memory"),
        ("[store]\ncommit_delay = -1\n", 2, 'from "0ms"'),
        ("[limits]\nmax_connections = true\n", 2, "a whole number"),
        ("[limits]\nsession_expiry = 'forever'\n", 2, '"never" or a time'),
        ("[gateway]\nname = ''\n", 2, "not empty"),
        ('[gateway]\nname = "a\\nb"\n', 2, "without control characters"),
        ("[[listner]]\nbind = '127.0.0.1:1883'\n", 1, "unknown section [listner]: did you mean [[listener]]?"),
        ("[[store]]\ndurability = 'full'\n", 1, "the section is written [store], with one bracket"),
        ("[listener]\nbind = '127.0.0.1:1883'\n", 1, "[[listener]], with two brackets"),
        ("[[listener]]\nbind = '127.0.0.1:99999'\n", 2, "a port from 0 to 65535"),
        ("[[listener]]\n[[listener]]\n", 2, "again"),
        ("[http]\nbind = '9883'\n", 2, "HOST:PORT with a port from 0 to 65535, such as 127.0.0.1:9883"),
        ("[http]\nbind = '127.0.0.1:1883'\n", 2, "http.bind = 127.0.0.1:1883 again"),
        ("listener = []\n", 0, "no listener is left"),
        ("[[listener]]\nbind = '192.0.2.1:1883'\n", 1, "tidegate passwd -c"),
        ("[uplink]\nbackends = ['mongo']\n", 2, "mongo comes with a later release"),
        ("[uplink]\nbackends = 7\n", 2, "a list of sqlite, redis"),
        ("[access]\nacl_file = 'acl'\n", 2, "access.acl_file comes with a later release"),
        ("[clock]\ntrust = 'allways'\n", 2, "auto | always | never (nearest: always)"),
        ("[clock]\nwait = '25h'\n", 2, 'a time from "0s" to "24h"'),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    (found,) = mistakes(tmp_path, text)
    assert found.startswith(f"gateway.toml:{line}: " if line else "gateway.toml: ")
    assert words in found


def test_a_byte_order_mark_as_windows_writes_it_is_no_part_of_the_text(tmp_path: Path) -> None:
    assert load(written(tmp_path, "\ufeff[gateway]\nname = 'barn'\n"), tmp_path, (), {}).name == "barn"


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory; name another with --config"):
        load(tmp_path / "gateway.toml", None, (), {})
    (tmp_path / "gateway.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load(tmp_path / "gateway.toml", None, (), {})


@pytest.mark.parametrize(
    ("first", "second", "wide"),
    [
        ("0.0.0.0:1900", "127.0.0.1:1900", "0.0.0.0:1900"),
        ("127.0.0.1:1900", "0.0.0.0:1900", "0.0.0.0:1900"),
        ("[::]:1900", "[::1]:1900", "[::]:1900"),
        ("localhost:1900", "[::]:1900", "[::]:1900"),
        ("192.0.2.1:1900", "0.0.0.0:1900", "0.0.0.0:1900"),
    ],
)
@pytest.mark.parametrize("password_file", [True, False])
def test_listeners_that_overlap_are_a_mistake(tmp_path: Path, first: str, second: str, wide: str, password_file: bool) -> None:
    access = "[access]\npassword_file = 'passwd'\n" if password_file else "\n\n"
    text = f"{access}[[listener]]\nbind = '{first}'\n[[listener]]\nbind = '{second}'\n"
    assert f"gateway.toml:5: {second} overlaps {first}: {wide} is every address of this machine already; take one out" in (
        mistakes(tmp_path, text)
    )


@pytest.mark.parametrize("other", ["127.0.0.1:1901", "[::]:1900", "[::1]:1900"])
def test_listeners_that_do_not_overlap_are_none(tmp_path: Path, other: str) -> None:
    """IPv6 listeners take IPv6 only."""
    config = load(written(tmp_path, "[access]\npassword_file = 'passwd'\n"), None, ("0.0.0.0:1900", other), {})
    assert [str(listener) for listener in config.listeners] == ["0.0.0.0:1900", other]


def test_any_free_port_may_be_asked_for_twice(tmp_path: Path) -> None:
    assert len(load(written(tmp_path, ""), None, ("127.0.0.1:0", "127.0.0.1:0"), {}).listeners) == 2


@pytest.mark.parametrize("letter", ["\u2028", "\x85"])
def test_only_a_line_feed_counts_as_a_line(tmp_path: Path, letter: str) -> None:
    (found,) = mistakes(tmp_path, f"# a{letter}b\n[store]\ndurability = 'ful'\n")
    assert found.startswith("gateway.toml:3: ")


def test_later_names_are_not_known_names() -> None:
    known = {f"{section}.{name}" for section, keys in KEYS.items() for name in keys}
    assert not known & LATER_KEYS


# -- flags, environment, file ----------------------------------------------------------------------------------------


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "[gateway]\ndata = '/from/file'\nname = 'file'\n[[listener]]\nbind = '127.0.0.1:1'\n")
    environ = {"TIDEGATE_GATEWAY__DATA": "/from/environment", "TIDEGATE_UPLINK__BACKENDS": "sqlite, redis"}
    config = load(path, None, (), environ)
    assert (config.data, config.name, config.backends) == (Path("/from/environment"), "file", ("sqlite", "redis"))
    config = load(path, Path("/from/flag"), ("127.0.0.1:2", "[::1]:3"), environ)
    assert (config.data, [str(listener) for listener in config.listeners]) == (
        Path("/from/flag"),
        ["127.0.0.1:2", "[::1]:3"],
    )


def test_mistakes_in_the_environment_are_told_beside_those_of_the_file(tmp_path: Path) -> None:
    environ = {
        "TIDEGATE_STORE__DURABILTY": "full",
        "TIDEGATE_LIMITS__MAX_INFLIGHT": "many",
        "TIDEGATE_LISTENER__BIND": "127.0.0.1:1",
        "TIDEGATE_NO_UVLOOP": "1",
    }
    found = mistakes(tmp_path, "[store]\ndurability = 'ful'\n", environ)
    assert [text.split(":")[0] for text in found] == [
        "environment variable TIDEGATE_STORE__DURABILTY",
        "environment variable TIDEGATE_LISTENER__BIND",
        "environment variable TIDEGATE_LIMITS__MAX_INFLIGHT",
        "gateway.toml",
    ]
    assert "did you mean TIDEGATE_STORE__DURABILITY?" in found[0]
    assert mistakes(tmp_path, "", {"TIDEGATE_FOO__BAR": "1"}) == [
        "environment variable TIDEGATE_FOO__BAR: unknown key; TIDEGATE_SECTION__KEY names a section and a key as"
        " gateway.toml has them"
    ]


def test_where_data_and_configuration_are_without_a_word(tmp_path: Path) -> None:
    assert default_data({"STATE_DIRECTORY": "/var/lib/tidegate:/other"}) == Path("/var/lib/tidegate")
    assert find_config({"XDG_CONFIG_HOME": str(tmp_path)}) in (None, Path("/etc/tidegate/gateway.toml"))


@needs_root
def test_the_service_s_configuration_means_the_service_s_data_for_every_user(tmp_path: Path) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path / "state")}
    with as_user(1000):
        assert default_data(environ, SYSTEM_CONF / "gateway.toml") == Path("/var/lib/tidegate")
        assert default_data(environ, tmp_path / "gateway.toml") == tmp_path / "state" / "tidegate"
        assert default_data(environ) == tmp_path / "state" / "tidegate"
    assert default_data(environ | {"STATE_DIRECTORY": "/x"}, SYSTEM_CONF / "gateway.toml") == Path("/x")


@needs_root
@pytest.mark.parametrize("closed", ["own", "system"])
def test_a_configuration_that_must_not_be_looked_at_is_one_mistake(closed: str) -> None:
    """/etc/tidegate as the service has it, or a closed ~/.config."""
    with seen_by_others() as place:
        for name in ("own", "system"):
            (place / name / "tidegate").mkdir(parents=True)
        (place / closed / "tidegate").chmod(0o750)
        environ = {"XDG_CONFIG_HOME": str(place / "own")}
        with as_user(1000):
            found = find_config(environ, place / "system" / "tidegate")
            with pytest.raises(ConfigError) as caught:
                load(found, None, (), environ)
        (mistake,) = caught.value.mistakes
        assert str(mistake) == (
            f"{place / closed / 'tidegate' / 'gateway.toml'}: cannot be read: Permission denied; use sudo, join the group that"
            " may read it (the service's is tidegate), or name another with --config FILE"
        )


# -- who may be let in -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bind", "narrowed"), [("0.0.0.0:1900", "127.0.0.1:1900"), ("[::]:1900", "[::1]:1900")])
def test_without_a_password_file_every_address_means_this_machine_only(tmp_path: Path, bind: str, narrowed: str) -> None:
    config = load(written(tmp_path, ""), None, (bind,), {})
    assert [str(listener) for listener in config.listeners] == [narrowed]
    (warning,) = config.warnings
    assert warning.startswith(f"not listening on {bind}, only on {narrowed}: ")
    assert f"`tidegate passwd -c {tmp_path / 'passwd'} USER`" in warning


def test_an_outside_address_without_a_password_file_is_left_out_beside_others(tmp_path: Path) -> None:
    text = "[[listener]]\nbind = '127.0.0.1:1883'\n[[listener]]\nbind = '192.0.2.1:1883'\n"
    config = load(written(tmp_path, text), None, (), {})
    assert [str(listener) for listener in config.listeners] == ["127.0.0.1:1883"]
    assert "not listening on 192.0.2.1:1883" in config.warnings[0]


def test_with_a_password_file_the_outside_is_listened_on_and_needs_a_name(tmp_path: Path) -> None:
    config = load(written(tmp_path, "[access]\npassword_file = 'passwd'\n"), None, ("0.0.0.0:1883",), {})
    assert config.listeners == (Listener("0.0.0.0", 1883, False),)
    assert not config.warnings


def test_who_wants_no_password_is_obeyed_and_warned(tmp_path: Path) -> None:
    config = load(written(tmp_path, "[[listener]]\nbind = '0.0.0.0:1883'\nallow_anonymous = true\n"), None, (), {})
    assert config.listeners == (Listener("0.0.0.0", 1883, True),)
    assert "lets anybody in" in config.warnings[0]
