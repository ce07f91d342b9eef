#!/bin/sh
# The image's entry point: where there is a volume at /sessions, the sessions are kept in it. What was not mounted, or
# not as this user may use it, gets a line.
case " $* " in *" --help"*) exec cellserve "$@" ;; esac
if [ "${1-}" = serve ]; then
    case " $* " in
    *" --models"*) ;;
    *) [ -n "$(ls "$CELLSERVE_MODELS" 2>&1)" ] ||
        echo "no models in $CELLSERVE_MODELS: docker run -v FOLDER:$CELLSERVE_MODELS:ro mounts a folder with yours" >&2 ;;
    esac
    case "${CELLSERVE_STORE:+set} $* " in
    set* | *" --store"*) ;;
    *)  if mountpoint -q /sessions; then
            export CELLSERVE_STORE=lmdb:/sessions
            [ -w /sessions ] || echo "user $(id -u) may not write to /sessions: chown $(id -u) the folder" >&2
        else
            echo "no volume at /sessions: sessions end with this container (docker run -v cells:/sessions keeps them)" >&2
        fi ;;
    esac
fi
exec cellserve "$@"
