#!/usr/bin/env bash
# Renew the third-party files under book/_assets from npm. A build of the book does not need Node; only this does.
#   mathjax/            MathJax 3 with all TeX extensions, and its fonts        Apache-2.0
#   widgets/embed.js    Jupyter's html-manager: widgets on a page, no kernel    BSD-3-Clause (widgets/LICENSE)
#   widgets/*.woff2     the Font Awesome icons that embed.js brings             OFL-1.1 (scripts.sil.org/OFL)
set -euo pipefail
cd "$(dirname "$0")"
MATHJAX=3.2.2 HTML_MANAGER=1.0.15

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fetch() {  # name@version -> $work/package
    rm -rf "$work/package"
    (cd "$work" && tar xzf "$(npm pack --silent "$1")")
}

fetch "mathjax@$MATHJAX"
rm -rf mathjax && mkdir -p mathjax/output/chtml/fonts
cp "$work/package/es5/tex-chtml-full.js" "$work/package/LICENSE" mathjax/
cp -r "$work/package/es5/output/chtml/fonts/woff-v2" mathjax/output/chtml/fonts/

fetch "@jupyter-widgets/html-manager@$HTML_MANAGER"
rm -f widgets/*.woff2
cp "$work"/package/dist/{embed.js,embed.js.LICENSE.txt,*.woff2} widgets/
