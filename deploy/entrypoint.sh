#!/bin/sh
# The image's entry point: where there is a volume at /sessions, the sessions are kept in it.
case " $* " in
*" --store"* | *" --help"*) ;;
" serve "*)
    if [ -n "${CELLSERVE_STORE:-}" ]; then :
    elif mountpoint -q /sessions; then export CELLSERVE_STORE=lmdb:/sessions
    else echo "no volume at /sessions: sessions end with this container (docker run -v cells:/sessions keeps them)" >&2
    fi ;;
esac
exec cellserve "$@"
