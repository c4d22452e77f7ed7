#!/bin/sh
# Makes .venv and installs the package into it, editable: setup.sh EXTRAS [DEPENDENCY_GROUP [VENV [REQUIREMENT]]]
# Does nothing when .venv already holds that. VENV is another folder than .venv, REQUIREMENT one more package, for a
# choice that is not the project's to make (torch==2.13.0). PYTHON names the Python to build from.
set -eu

cd "$(dirname "$0")/.."
extras=$1
group=${2:-}
venv=${3:-.venv}
requirement=${4:-}
stamp="$venv/.installed-$extras-$group"
wanted="$(cksum < pyproject.toml) $requirement"

in_range() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null
}

version() {
    "$1" -c 'import sys; print("Python %d.%d" % sys.version_info[:2])' 2> /dev/null || true
}

find_python() {
    [ -n "${PYTHON:-}" ] && set -- "$PYTHON" || set -- python3.13 python3.12 python3.11 python3 python
    lacking=""
    for candidate; do
        if in_range "$candidate"; then
            if "$candidate" -c 'import ensurepip, venv' 2> /dev/null; then
                echo "$candidate"
                return
            fi
            lacking=$candidate
        fi
    done
    if [ -n "$lacking" ]; then
        echo "setup: $lacking lacks the venv module (on Debian and Ubuntu: apt install python3-venv)." >&2
    elif [ -n "${PYTHON:-}" ]; then
        echo "setup: PYTHON=$PYTHON is not a Python from 3.11 to 3.13." >&2
    else
        echo "setup: no Python from 3.11 to 3.13 found. Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2
    fi
    return 1
}

# A virtual environment is bound to the folder that it was made in.
venv_is_usable() {
    in_range "$venv"/bin/python && "$venv"/bin/python -c 'import pip' 2> /dev/null &&
        [ "$(cat "$venv"/.made-in 2> /dev/null)" = "$PWD" ] &&
        { [ -z "${PYTHON:-}" ] || [ "$(version "$PYTHON")" = "$(version "$venv"/bin/python)" ]; }
}

if ! venv_is_usable; then
    python=$(find_python)
    echo "setup: making $venv with $(version "$python")"
    "$python" -m venv --clear "$venv"
    echo "$PWD" > "$venv"/.made-in
elif [ "$(cat "$stamp" 2> /dev/null)" = "$wanted" ]; then
    echo "setup: $venv is ready"
    exit
fi

echo "setup: updating pip"
"$venv"/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"

echo "setup: installing fastsepconv[$extras]${group:+ and the $group tools}; the first time this takes some minutes"
PYTHONWARNINGS=ignore::UserWarning "$venv"/bin/python -m pip install --quiet --editable ".[$extras]" ${group:+--group "$group"} ${requirement:+"$requirement"}
echo "$wanted" > "$stamp"
echo "setup: $venv is ready"
