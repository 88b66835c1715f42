#!/bin/sh
# What `make` needs before it can start: a Python, a Node, room on the disk, a browser for the tests.
# Each check answers with nothing, or with one sentence and exit status 1.
#
#   prerequisites.sh python [CANDIDATE]   prints a Python 3.11 or newer that can make an environment
#   prerequisites.sh node
#   prerequisites.sh space FOLDER MEGABYTES
#   prerequisites.sh chromium             installs Debian's where it may
set -eu

refuse() {
    printf 'neural-mri: %s\n' "$1" >&2
    exit 1
}

find_python() {
    if [ -n "${1:-}" ]; then
        usable "$1" || refuse "PYTHON=$1 is not a Python 3.11 or newer with the venv module: name another."
        printf '%s\n' "$1"
        return
    fi
    for candidate in python3.13 python3.12 python3.11 python3 python; do
        if usable "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    refuse "Python 3.11 or newer with its venv module was not found: install it (Debian, Ubuntu: apt-get install python3 python3-venv), or name one with make PYTHON=/path/to/python3."
}

# A name may be on PATH and still run nothing (version managers' shims), so it is asked to run.
usable() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

check_node() {
    version=$(node --version 2>/dev/null) ||
        refuse "Node.js was not found: the viewer is built with Node 20.19 or newer (https://nodejs.org)."
    command -v npm >/dev/null 2>&1 ||
        refuse "npm was not found beside Node.js $version: install it (Debian, Ubuntu: apt-get install npm)."
    node -e 'const [a, b] = process.versions.node.split(".").map(Number);
             process.exit(a > 20 || (a === 20 && b >= 19) ? 0 : 1)' ||
        refuse "Node.js is $version: the viewer is built with Node 20.19 or newer (https://nodejs.org)."
}

check_space() {
    free=$(df -Pm "$1" | awk 'NR == 2 { print $4 }')
    [ "$free" -ge "$2" ] ||
        refuse "the disk of $(cd "$1" && pwd) has $free MB free: the installation needs $2 MB."
}

find_chromium() {
    for browser in chromium chromium-browser google-chrome google-chrome-stable; do
        if command -v "$browser" >/dev/null 2>&1; then
            return
        fi
    done
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "Installing Chromium for the viewer's tests ..."
        if { apt-get update && apt-get install --yes --no-install-recommends chromium; } >/dev/null 2>&1
        then
            return
        fi
    fi
    refuse "Chromium was not found: the viewer's tests drive it (Debian, Ubuntu: apt-get install chromium)."
}

case "$1" in
python) find_python "${2:-}" ;;
node) check_node ;;
space) check_space "$2" "$3" ;;
chromium) find_chromium ;;
*) refuse "$1 is not a prerequisite: expected python, node, space or chromium." ;;
esac
