# Sourced by the scripts that bring a program for one test: from Debian's packages, unpacked, with nothing installed.

unpack_debian() { # unpack_debian FOLDER PACKAGE...: they and whatever they need that is not here, into FOLDER/root
    local folder=$1 deb
    shift
    command -v apt-get >/dev/null || { echo "there is no $* here, and no apt-get to find it with" >&2; return 1; }
    needed() { apt-get install --simulate --no-install-recommends "$@" 2>/dev/null | awk '/^Inst/ {print $2}'; }
    rm -rf "$folder" && mkdir -p "$folder/root"
    [ -n "$(needed "$@")" ] || apt-get update >/dev/null
    (cd "$folder" && apt-get download -q $(needed "$@") >download.log 2>&1) || { cat "$folder/download.log" >&2; return 1; }
    for deb in "$folder"/*.deb; do dpkg -x "$deb" "$folder/root"; done
    rm "$folder"/*.deb
}
