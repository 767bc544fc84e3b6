# Parts under one deadline, and everything that they leave in one archive. Sourced, by bench/gpu.sh.
#
# Before: RUN (what the run is called), RESULTS (a folder), DEADLINE (seconds from the start), PARTS
# (names, in order of worth), NAMED ("yes": they were asked for by name), and a function `table`
# that prints what is in $work. Then `part` for each part. However the script ends, RESULTS gets
# $RUN.md, the table, and $RUN.tar.gz with it and all that parts left in $work; the table is shown.
# A part that reaches its limit is cut short if it has left some results, $work/NAME.json, else it
# has failed. The exit status is 1 if a part failed, or was left out or cut short though asked for
# by name.

reserve=15 # seconds for the table, the archive, and a part that must be killed
failures=()
child=
mkdir -p "$RESULTS" || exit 2
work=$(mktemp -d) || exit 2
trap finish EXIT
trap 'failures+=("stopped by a signal"); exit 1' INT TERM HUP

wanted() { # NAME: whether it is among the parts
    [[ " $PARTS " == *" $1 "* ]]
}

note() { # NAME, OUTCOME, seconds it took: for the table, and for whoever watches
    echo "=== $1: $2 ($3 s)"
    printf '%s\t%s\t%s\n' "$1" "$3" "$2" >> "$work/parts.tsv"
}

left_out() { # NAME, WHY
    note "$1" "left out: $2" 0
    [ "$NAMED" != yes ] || failures+=("$1: left out: $2")
}

part() { # NAME, the seconds it is worth beginning with, seconds at most, COMMAND...
    local name=$1 least=$2 limit=$3 begin=$SECONDS left=$((DEADLINE - reserve - SECONDS)) status=0
    shift 3
    wanted "$name" || return 0
    [ "$left" -ge "$least" ] || {
        left_out "$name" "$left s are left, it needs $least"
        return
    }
    [ "$limit" -lt "$left" ] || limit=$left
    echo "=== $name: at most $limit s"
    : > "$work/$name.log" # before tail looks for it
    # In the background: a signal would otherwise wait for the command.
    timeout --kill-after=5 "$limit" "$@" >> "$work/$name.log" 2>&1 &
    child=$!
    tail -n +1 -s 0.1 -f --pid="$child" "$work/$name.log" &
    wait "$child" || status=$?
    child=
    wait
    local took=$((SECONDS - begin))
    if [ "$status" = 0 ]; then
        note "$name" succeeded "$took"
    elif [ "$took" -lt "$limit" ]; then
        note "$name" "FAILED, exit status $status" "$took"
        failures+=("$name: exit status $status")
    elif [ -e "$work/$name.json" ]; then
        note "$name" "cut short at its limit: what is there is some of its results" "$took"
        [ "$NAMED" != yes ] || failures+=("$name: cut short after $limit s")
    else
        note "$name" "FAILED, stopped at its limit" "$took"
        failures+=("$name: stopped after $limit s")
    fi
}

finish() {
    local status=$?
    trap - EXIT
    trap '' INT TERM HUP
    [ -z "$child" ] || kill "$child" 2> /dev/null
    wait
    table > "$work/$RUN.md" 2> "$work/table.log" || failures+=("table: $(tail -1 "$work/table.log")")
    cp "$work/$RUN.md" "$RESULTS" && tar -czf "$RESULTS/$RUN.tar.gz" -C "$work" . ||
        failures+=("archive: it could not be written to $RESULTS")
    cat "$work/$RUN.md"
    rm -rf "$work"
    echo "$SECONDS s in all; the table and all files: $RESULTS/$RUN.md, $RESULTS/$RUN.tar.gz"
    [ ${#failures[@]} = 0 ] || {
        printf 'FAILED %s\n' "${failures[@]}"
        [ "$status" != 0 ] || status=1
    }
    exit "$status"
}
