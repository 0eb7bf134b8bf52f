"""The page's style and its few lines of script. Both are constants: nothing of a user's ever gets into them.

The script asks for sizes of what is on screen only: of 200 merges at once, in closed parts, that took half a minute.
"""

from __future__ import annotations

import base64
import hashlib

LIGHT = (
    "#f2f6fb",
    "#dce9f6",
    "#c3daee",
    "#a3c8e4",
    "#7db2d8",
    "#579bca",
    "#3d86bb",
    "#1c69a4",
    "#0a4f8a",
    "#08346a",
)
"""Heat colours, smallest first."""

DARK = (
    "#17212d",
    "#1b2f44",
    "#1f3f5e",
    "#23517a",
    "#2a6597",
    "#3a76ab",
    "#5c9acd",
    "#78addb",
    "#a2c8ec",
    "#cfe3f7",
)

LIGHT_TEXT = ("#111111",) * 7 + ("#ffffff",) * 3
DARK_TEXT = ("#ffffff",) * 6 + ("#111111",) * 4

LIGHT_LINES = ("#0067a6", "#c24a00", "#00785a", "#9c3f78", "#444444", "#8a6100")
DARK_LINES = ("#62b8ea", "#ff9657", "#35c9a0", "#ea9cc9", "#d8d8d8", "#edc04f")


def _colours(heat: tuple[str, ...], ink: tuple[str, ...], lines: tuple[str, ...]) -> str:
    steps = "".join(f"--h{step}:{one};--t{step}:{ink[step]};" for step, one in enumerate(heat))
    return steps + "".join(f"--c{index}:{one};" for index, one in enumerate(lines))


_LIGHT = (
    "--bg:#ffffff;--soft:#f4f6f8;--fg:#16191d;--dim:#545c66;--rule:#d4d9df;--link:#0059a8;--warn:#8a3b00;"
    f"{_colours(LIGHT, LIGHT_TEXT, LIGHT_LINES)}"
)
_DARK = (
    "--bg:#101418;--soft:#181e24;--fg:#e8ebee;--dim:#a4adb7;--rule:#343c45;--link:#7cbcf5;--warn:#ffb27d;"
    f"{_colours(DARK, DARK_TEXT, DARK_LINES)}"
)

_STEPS = "".join(f".h{step}{{background:var(--h{step});color:var(--t{step})}}" for step in range(len(LIGHT)))
_LINES = "".join(f".c{index}{{--c:var(--c{index})}}" for index in range(len(LIGHT_LINES)))

STYLE = f"""
:root{{color-scheme:light dark;{_LIGHT}}}
@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
*{{box-sizing:border-box}}
html{{scroll-behavior:smooth;-webkit-text-size-adjust:100%}}
@media (prefers-reduced-motion:reduce){{html{{scroll-behavior:auto}}}}
body{{margin:0 auto;max-width:1200px;padding:0 16px 48px;background:var(--bg);color:var(--fg);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:anywhere}}
h1{{font-size:1.6rem;line-height:1.2;margin:24px 0 4px}}
h2{{font-size:1.25rem;margin:40px 0 8px;padding-top:12px;border-top:2px solid var(--rule)}}
h3{{font-size:1.05rem;margin:24px 0 8px}}
h4{{font-size:.95rem;margin:20px 0 6px}}
summary h3{{display:inline;font-size:1.05rem}}
a{{color:var(--link)}}
:focus-visible{{outline:3px solid var(--link);outline-offset:2px}}
code,.id{{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.92em}}
.skip{{position:absolute;left:-9999px}}.skip:focus{{position:static}}
.note,small,caption,figcaption{{color:var(--dim)}}
.note{{font-size:.9rem;max-width:75ch}}ul.note{{padding-left:20px}}
.warn{{border-left:4px solid var(--warn);padding:8px 12px;background:var(--soft)}}
.warn h3{{margin-top:0}}
nav ul{{list-style:none;display:flex;flex-wrap:wrap;gap:4px 16px;padding:0;margin:12px 0}}
nav a{{display:inline-block;padding:4px 0}}
button{{font:inherit;padding:4px 12px;margin-right:8px;color:var(--fg);background:var(--soft);
 border:1px solid var(--rule);border-radius:6px}}
dl.facts{{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:8px;margin:16px 0}}
dl.facts div{{background:var(--soft);border-radius:8px;padding:8px 12px}}
dl.facts dt{{color:var(--dim);font-size:.85rem}}dl.facts dd{{margin:0;font-size:1.15rem;font-weight:600}}
.scroll{{overflow-x:auto;max-width:100%;margin:8px 0}}
table{{min-width:min(100%,24rem);border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}}
caption{{text-align:left;padding:4px 0;position:sticky;left:0;max-width:min(75ch,calc(100vw - 60px))}}
caption b{{color:var(--fg)}}caption small{{display:block}}
th,td{{padding:3px 8px;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule);overflow-wrap:normal}}
tbody th{{font-weight:500;overflow-wrap:break-word;min-width:9em;max-width:26em;
 position:sticky;left:0;background:var(--bg)}}
.numbers td{{text-align:right;white-space:nowrap}}
.numbers thead th:not(:first-child){{text-align:right}}
.merges td:nth-child(2),.merges thead th:nth-child(2){{text-align:left}}
table.pairs td{{overflow-wrap:anywhere}}
.pairs tbody th{{min-width:7em}}
.heat th,.heat td{{border:1px solid var(--bg);padding:2px 6px}}
.heat thead th{{vertical-align:bottom;font-weight:500;font-size:.8rem;min-width:3.4em}}
.heat tbody th{{min-width:3em;white-space:nowrap;text-align:right;color:var(--dim)}}
.heat td{{text-align:right;white-space:nowrap;font-size:.82rem}}
{_STEPS}
.hx{{background:repeating-linear-gradient(45deg,var(--bg) 0 3px,var(--rule) 3px 4px);color:var(--fg)}}
.scale{{display:flex;flex-wrap:wrap;align-items:center;gap:8px;margin:2px 0 16px;font-size:.82rem;color:var(--dim)}}
.scale .bar{{display:inline-flex;border:1px solid var(--rule)}}.scale i{{display:inline-block;width:18px;height:12px}}
.scale .unknown i{{border:1px solid var(--rule)}}
.maps,.charts{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));
 gap:8px 32px;align-items:start}}
.maps>*,.charts>*{{min-width:0}}
figure{{margin:12px 0}}figcaption{{font-size:.88rem}}figcaption small{{display:block}}
svg.chart{{display:block;width:100%;height:auto;max-width:560px}}
svg.wide{{max-width:none;min-width:820px}}
svg text{{fill:var(--dim);font-size:12px;font-family:inherit}}svg.wide text{{font-size:10px}}
svg .end{{text-anchor:end}}svg .middle{{text-anchor:middle}}
.grid{{stroke:var(--rule);fill:none}}
{_LINES}
.line{{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}}
.d1{{stroke-dasharray:7 4}}.d2{{stroke-dasharray:2 4}}
.unit{{fill:var(--c);stroke:var(--bg);stroke-width:.6}}
.dot{{fill:var(--bg);stroke:var(--c0);stroke-width:2}}.best{{fill:var(--c1);stroke:var(--fg);stroke-width:1}}
.legend{{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;padding:0;margin:4px 0;color:var(--fg)}}
.legend svg{{width:26px;height:10px;vertical-align:middle}}.legend svg.box{{width:14px}}
details{{border:1px solid var(--rule);border-radius:8px;margin:8px 0}}
summary{{cursor:pointer;padding:8px 12px;background:var(--soft);border-radius:8px}}
summary small{{margin-left:8px}}
.inside{{padding:0 12px 12px;content-visibility:auto;contain-intrinsic-size:auto 600px}}
.inside>:first-child{{margin-top:12px}}
footer{{margin-top:40px;border-top:1px solid var(--rule);padding-top:8px;color:var(--dim);font-size:.85rem}}
@media (max-width:600px){{svg.chart:not(.wide) text{{font-size:14.5px}}
 .heat th,.heat td,.heat thead th,.heat tbody th{{padding:2px 3px;font-size:.74rem;min-width:0}}
 body{{padding:0 12px 32px}}h1{{font-size:1.35rem}}.inside{{padding:0 8px 8px}}
 .scale i{{width:14px}}}}
@media print{{body{{max-width:none;font-size:9pt}}table{{font-size:7.5pt}}.numbers td{{white-space:normal}}
 nav,button,.skip{{display:none}}.scroll{{overflow:visible}}
 details{{border:0}}.inside{{content-visibility:visible}}figure,.heat,tr{{break-inside:avoid}}h2,h3,h4,caption{{break-after:avoid}}
 *{{-webkit-print-color-adjust:exact;print-color-adjust:exact}}svg.wide{{min-width:0}}}}
"""

SCRIPT = """
"use strict";
const all = () => document.querySelectorAll("details");
const show = () => {
  let there = null;
  try { there = document.getElementById(decodeURIComponent(location.hash.slice(1))); } catch (error) { return; }
  for (let one = there; one; one = one.parentElement) if (one.tagName === "DETAILS") one.open = true;
  if (there) there.scrollIntoView();
};
const wide = new IntersectionObserver((seen) => seen.forEach(({ target, isIntersecting }) => {
  if (isIntersecting) target.tabIndex = target.scrollWidth > target.clientWidth ? 0 : -1;
}));
document.querySelectorAll(".scroll").forEach((one) => wide.observe(one));
addEventListener("hashchange", show);
addEventListener("beforeprint", () => all().forEach((one) => { one.open = true; }));
document.getElementById("open-all").addEventListener("click", () => all().forEach((one) => { one.open = true; }));
document.getElementById("close-all").addEventListener("click", () => all().forEach((one) => { one.open = false; }));
show();
"""

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; script-src 'sha256-"
    f"{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
)
"""Content-Security-Policy: no request to anywhere, and no script but this one, whatever else a page may hold."""
