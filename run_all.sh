#!/usr/bin/env bash
# Set up what is missing, then execute the study. `./run_all.sh --help` tells how.
set -euo pipefail

usage() {
    cat <<'EOF'
Usage: ./run_all.sh [--profile P] [--only 01,03] [--data-dir DIR]    execute the notebooks
       ./run_all.sh figures [--profile P]           redraw tables and figures from stored runs, without training
       ./run_all.sh test                            lint and test everything
       ./run_all.sh --help

  --profile P     how large the experiments are: a file of notebooks/profiles (default: quick)
  --only 01,03    only the notebooks with these numbers
  --data-dir DIR  read published archives that are in DIR: mnist-inrs, fmnist_inrs (or .zip), small_cnn_zoo_cifar10,
                  cnn_wild_park

Uses the active virtual or conda environment, else makes .venv; installs what is missing there, once.
Finished runs are stored in cache/ (elsewhere if NGCORE_CACHE names a directory) and found again: stop whenever you
like, start again, and it goes on where it stopped. Executed notebooks with their outputs appear in executed/<profile>/.
EOF
}

fail() {
    printf 'run_all.sh: %s\n' "$1" >&2
    exit "${2:-1}"
}

fail_usage() {
    printf 'run_all.sh: %s\n\n' "$1" >&2
    usage >&2
    exit 2
}

parse_arguments() {
    action=run profile=quick only= data_dir=
    case ${1-} in
        figures | test)
            action=$1
            shift
            ;;
        -* | '') ;;
        *) fail_usage "unknown command '$1'" ;;
    esac
    while [[ $# -gt 0 ]]; do
        case $action:$1 in
            *:-h | *:--help)
                usage
                exit 0
                ;;
            run:--profile | figures:--profile) profile=${2-} ;;
            run:--only) only=${2-} ;;
            run:--data-dir) data_dir=${2-} ;;
            run:*) fail_usage "unknown option '$1'" ;;
            *) fail_usage "'$action' has no option '$1'" ;;
        esac
        [[ -n ${2-} ]] || fail_usage "$1 needs a value"
        shift 2
    done
}

# Before anything is installed: a mistyped profile should not cost a newcomer ten minutes.
require_profile() {
    local file known=
    [[ -f notebooks/profiles/$profile.yaml ]] && return
    for file in notebooks/profiles/*.yaml; do
        known+=" $(basename "$file" .yaml)"
    done
    fail "unknown profile '$profile'; there are:$known" 2
}

require_writable() {
    local directory
    for directory in "$@"; do
        if ! { mkdir -p "$directory" && rm "$(mktemp "$directory/.writable.XXXXXX")"; } 2>/dev/null; then
            fail "cannot write to $directory: make it a directory that you may write to, with space left on its disk"
        fi
    done
}

is_supported() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Sets `environment` and `python`. Conda's base environment is often active by itself: it is left alone.
choose_environment() {
    environment=$root/.venv
    [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-} != base ]] && environment=$CONDA_PREFIX
    [[ -n ${VIRTUAL_ENV:-} ]] && environment=$VIRTUAL_ENV
    python=$environment/bin/python
}

make_environment() {
    is_supported python3 || fail "Python 3.11 or newer is needed; python3 is $(python3 --version 2>&1 || true)"
    echo "Making the environment $environment"
    python3 -m venv "$environment" ||
        fail "python3 -m venv failed (on Debian and Ubuntu: install the package python3-venv, then start again)"
}

# Installs the pinned packages unless the environment's stamp says that exactly these are there, for this directory.
install() {
    local stamp_file=$environment/.ngcore-installed stamp
    stamp="$root $(cat pyproject.toml constraints.txt | cksum)"
    if [[ -x $python && -f $stamp_file && $(<"$stamp_file") == "$stamp" ]]; then
        return
    fi
    if [[ $environment == "$root/.venv" ]] && ! "$python" -m pip --version >/dev/null 2>&1; then
        make_environment
    fi
    is_supported "$python" || fail "$environment is active but holds no Python 3.11 or newer: deactivate it, then start again"
    require_writable "$environment"
    echo "Installing PyTorch into $environment (once, several minutes)"
    "$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
    echo "Installing ngcore and the other packages"
    "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
    printf '%s\n' "$stamp" >"$stamp_file.partial"
    mv "$stamp_file.partial" "$stamp_file"
}

# Large tensors come and go at every step: keep their memory in the process, in huge pages, instead of giving it back each time.
# Compiled code is kept between runs, since compiling a model costs longer than a small run. What the caller has set, stays.
tune() {
    export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296}
    export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-4294967296}
    export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
}

run_tests() {
    echo "Checking style"
    "$python" -m ruff check
    "$python" -m ruff format --check
    echo "Testing"
    # a process per core, of one thread each: tiny tensors, for which threads would only wait for each other
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$python" -m pytest -n auto --dist worksteal
}

parse_arguments "$@"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -n ${NGCORE_CACHE:-} ]]; then
    case $NGCORE_CACHE in
        /*) ;;
        *) export NGCORE_CACHE=$PWD/$NGCORE_CACHE ;; # relative to where the user stands, not to a notebook
    esac
fi
cache=${NGCORE_CACHE:-$root/cache}
if [[ -n $data_dir ]]; then
    [[ -d $data_dir ]] || fail "--data-dir: $data_dir is no directory" 2
    NGCORE_DATA=$(cd "$data_dir" && pwd)
    export NGCORE_DATA
fi
cd "$root"

require_profile
require_writable "$cache/inductor" "$root/executed"
choose_environment
install
tune
case $action in
    test) run_tests ;;
    figures) exec "$python" -m ngcore.study figures --profile "$profile" ;;
    run) exec "$python" -m ngcore.study run --profile "$profile" ${only:+--only "$only"} ;;
esac
