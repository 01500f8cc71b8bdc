#!/usr/bin/env bash
# fetch.sh DIR: QEMU, a Linux kernel with CXL, busybox and Python from Debian, unpacked under DIR; nothing is installed.
# Uses the mirror that this machine's apt already uses, with a state of its own: ~80 MB, ~20 s, nothing the second time.
# Exit status 77 and one line on standard error: this machine cannot have them.
set -euo pipefail
dir=$(realpath -m "$1")
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
skip() { echo "$1" >&2; exit 77; }

[ "$(uname -m)" = x86_64 ] || skip "not an x86-64 machine but $(uname -m)"
{ command -v apt-get && command -v dpkg-deb; } >/dev/null || skip "no apt-get here: the packages come from Debian"
[ -r "$keyring" ] || skip "no $keyring: the packages come from Debian"

mkdir -p "$(dirname "$dir")"
exec 9>"$dir.lock"
flock 9
# The stamp has this script's checksum and those of what was unpacked: a changed recipe or a damaged cache starts anew.
self=$(sha256sum <"$0")
if [ "$(head -1 "$dir/stamp" 2>/dev/null)" = "$self" ] && (cd "$dir" && tail -n +2 stamp | sha256sum --check --quiet) 2>/dev/null; then
    exit 0
fi

mirror=$(apt-get indextargets --format '$(REPO_URI) $(CREATED_BY)' | awk '$2 == "Packages" && $1 !~ /security/ { print $1; exit }')
[ -n "$mirror" ] || skip "apt has no mirror configured (apt-get indextargets)"

rm -rf "$dir" "$dir.partial"
work=$dir.partial
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{root,apt/lists/partial,apt/cache/archives/partial}
: >"$work/apt/status" # no package is installed: every dependency is fetched
printf "deb [signed-by=$keyring] $mirror %s main\n" trixie trixie-backports >"$work/apt/sources.list"
cat >"$work/apt/conf" <<EOF
Dir::State::lists "$work/apt/lists"; Dir::State::status "$work/apt/status"; Dir::Cache "$work/apt/cache";
Dir::Etc::sourcelist "$work/apt/sources.list"; Dir::Etc::sourceparts "/dev/null"; APT::Sandbox::User "";
Acquire::Retries "1"; Acquire::http::Timeout "20"; Acquire::https::Timeout "20";
EOF
export APT_CONFIG=$work/apt/conf

cd "$work/apt/cache/archives"
fetch() {
    timeout 60 apt-get -qq update --error-on=any &&
        timeout 90 apt-get -qq -y --download-only --no-install-recommends -t trixie-backports install qemu-system-x86 &&
        kernel=$(apt-cache -t trixie-backports depends linux-image-cloud-amd64 | grep -oE 'linux-image-[0-9].*') &&
        timeout 60 apt-get -qq download "${kernel/image/binary}" "${kernel/image/modules}" busybox-static \
            python3.13-minimal libpython3.13-minimal libpython3.13-stdlib libffi8 zlib1g libexpat1 libc6
}
# apt checks every package against the archive's signature.
fetch >"$work/log" 2>&1 || skip "$mirror cannot be had: $(grep -m1 '^E' "$work/log" || tail -1 "$work/log")"

for package in *.deb; do dpkg-deb -x "$package" "$work/root"; done
rm -rf "$work"/{apt,log} "$work/root/usr/share/doc" "$work/root/usr/share/locale"
(cd "$work" && { echo "$self"; find root -type f -size +1M -print0 | sort -z | xargs -0 sha256sum; } >stamp)
mv "$work" "$dir"
trap - EXIT
