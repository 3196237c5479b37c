"""The completion script in a real bash: verbs, verbs of groups, options, choices and files."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from minilm.orchestrator.cli import main

COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
complete -p minilm >/dev/null || exit 9
function=$(complete -p minilm | sed 's/.*-F \\([^ ]*\\).*/\\1/')
"$function" minilm "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "minilm.bash"
    done = subprocess.run(
        [sys.executable, "-m", "minilm", "completion", "bash"], capture_output=True, text=True, check=True
    )
    path.write_text(done.stdout)
    return path


def completed(script, *words: str, folder=None) -> set[str]:
    done = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE, "bash", str(script), *words],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
    )
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes(script, tmp_path):
    (tmp_path / "mine.yaml").touch()
    assert {"run", "check", "status", "list"} <= completed(script, "minilm", "")
    assert completed(script, "minilm", "ch") == {"check"}
    assert completed(script, "minilm", "data", "ver") == {"verify", "verify-run"}
    assert completed(script, "minilm", "run", "--work") == {"--workdir"}
    assert completed(script, "minilm", "run", "--launcher", "") == {"ray", "inline"}
    assert completed(script, "minilm", "run", "mi", folder=tmp_path) == {"mine.yaml"}
    assert completed(script, "minilm", "data", "build", "mi", folder=tmp_path) == {"mine.yaml"}
    assert completed(script, "minilm", "data", "repair", "x", "--mirror", "mi", folder=tmp_path) == {
        "mine.yaml"
    }


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_every_verb(shell, capsys):
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in ("status", "verify-run", "gradient-sum", "--workdir"))


@pytest.mark.parametrize(("shell", "options"), [("zsh", ["-n"]), ("fish", ["--no-execute"])])
def test_other_shells_read_their_script(shell, options, tmp_path, capsys):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    main(["completion", shell])
    path = tmp_path / "script"
    path.write_text(capsys.readouterr().out)
    subprocess.run([shell, *options, str(path)], check=True)
