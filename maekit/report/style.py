"""How the page looks and what its one script does: light and dark, phone and paper, without any font or library."""

from __future__ import annotations

COLOURS = {
    # name: as matplotlib draws it, in a dark room
    "train": ("#8fb3d9", "#5f8fc4"),
    "heldout": ("#1f4e79", "#9cc7f2"),
    "knn": ("#2a7f62", "#6fcba9"),
    "linear": ("#c4622d", "#f0a077"),
    "rank": ("#777777", "#a5a9ae"),
    "violet": ("#7b4ba0", "#c39ce0"),
    "gold": ("#b08a1e", "#dcbd62"),
    "ink": ("#222222", "#e4e6e9"),
    "pale": ("#666666", "#a3a8af"),
    "grid": ("#e6e6e6", "#30353b"),
    "edge": ("#bbbbbb", "#4a5058"),
    "bad": ("#b00020", "#ff8a9b"),
}
"""Colours of the curves and of the words, in both lights."""

_LIGHT = "".join(f"--{name}:{light};" for name, (light, _) in COLOURS.items()) + (
    "--paper:#ffffff;--soft:#f5f6f8;--link:#1f4e79;--mark:#fff6e0;--markedge:#e0b64f;"
)
_DARK = "".join(f"--{name}:{dark};" for name, (_, dark) in COLOURS.items()) + (
    "--paper:#15181c;--soft:#1e2227;--link:#9cc7f2;--mark:#2e2715;--markedge:#8a6d1f;"
)
STYLE = (
    f":root{{color-scheme:light dark;{_LIGHT}}}\n@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}\n"
    f"@media print{{:root{{color-scheme:light;{_LIGHT}}}}}\n"
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);overflow-wrap:break-word;
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
header,main,footer{max-width:70rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.25rem}
footer{padding-top:2rem;padding-bottom:2.5rem;color:var(--pale);font-size:.875rem}
.skip{position:absolute;left:-99rem}
.skip:focus{left:1rem;top:1rem;background:var(--paper);padding:.5rem 1rem;z-index:2}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .25rem;letter-spacing:-.01em}
h2{font-size:1.3rem;line-height:1.3;margin:2.75rem 0 .75rem;padding-top:1rem;border-top:1px solid var(--grid)}
h3{font-size:1.05rem;margin:2rem 0 .5rem}
p{margin:.5rem 0 .75rem;max-width:46rem}
ul{margin:.25rem 0 .75rem;padding-left:1.25rem;max-width:46rem}
a{color:var(--link)}
a:focus-visible,summary:focus-visible,input:focus-visible,.wide:focus-visible{outline:2px solid var(--link);
 outline-offset:2px}
code{font:.875em/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;background:var(--soft);
 padding:.1em .35em;border-radius:.25rem;overflow-wrap:anywhere}
.sub,.note{color:var(--pale)}
.note{font-size:.875rem}
.lead{font-size:1.0625rem;margin-top:1rem}
.state{display:inline-block;border:1px solid var(--edge);border-radius:1rem;padding:0 .65rem;font-size:.8125rem;
 vertical-align:middle;margin-left:.4rem;color:var(--pale);font-weight:400;letter-spacing:0}
.state.running{color:var(--knn);border-color:var(--knn)}
.state.stopped{color:var(--linear);border-color:var(--linear)}
.next{border-left:3px solid var(--heldout);background:var(--soft);padding:.65rem 1rem;margin:1rem 0;max-width:46rem}
.next p{margin:.2rem 0}
.warn{border-left:3px solid var(--markedge);background:var(--mark);padding:.65rem 1rem;margin:1rem 0;max-width:46rem}
.warn ul{margin:.2rem 0}
nav ul{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;margin:.75rem 0 0;max-width:none}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;margin:1.25rem 0}
.tiles div{background:var(--soft);border-radius:.5rem;padding:.7rem .9rem}
.tiles dt{font-size:.8125rem;color:var(--pale)}
.tiles dd{margin:0;font-size:1.35rem;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums}
.tiles small{display:block;font-size:.8125rem;font-weight:400;color:var(--pale);line-height:1.35}
.pairs{margin:.5rem 0 1rem}
.pairs div{display:grid;grid-template-columns:11rem minmax(0,1fr);gap:1rem;padding:.3rem 0;
 border-bottom:1px solid var(--grid)}
.pairs dt{color:var(--pale)}
.pairs dd{margin:0}
.wide{overflow-x:auto;margin:.75rem 0 1rem}
table{border-collapse:collapse;font-size:.9rem;line-height:1.4;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding-bottom:.4rem;white-space:nowrap}
th,td{text-align:left;padding:.4rem .9rem .4rem 0;border-bottom:1px solid var(--grid);vertical-align:top;
 overflow-wrap:normal}
thead th{color:var(--pale);font-weight:500;border-bottom:1px solid var(--edge);vertical-align:bottom}
tbody th{font-weight:500;max-width:22rem;overflow-wrap:anywhere}
td{max-width:26rem;min-width:3rem}
td:not(.n){min-width:5.5rem}
tbody th{min-width:6.5rem}
.lint td{min-width:6rem}
.lint td:last-child{min-width:16rem}
.n{text-align:right;white-space:nowrap}
td small,th small{color:var(--pale);font-weight:400}
figure{margin:0 0 1.25rem}
figcaption{font-weight:600;font-size:.95rem;margin-bottom:.25rem}
figcaption .note{font-weight:400}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:.5rem 2rem;margin-top:1rem}
.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.25rem 1.5rem;max-width:none}
.key{display:inline-block;width:2rem;border-top-width:3px;margin-right:.5rem;vertical-align:middle}
svg{display:block;width:100%;height:auto;max-width:40rem}
svg text{font-family:inherit}
.white{background:#fff;color:#222;border-radius:.5rem;padding:.5rem;max-width:38rem}
.half svg{max-width:52rem}
img{max-width:100%;height:auto;display:block;border-radius:.25rem;background:#fff}
.slide{display:flex;flex-wrap:wrap;align-items:center;gap:.5rem 1rem;margin:.5rem 0}
.slide input{flex:1 1 14rem;max-width:32rem;min-height:2rem;accent-color:var(--heldout)}
.slide output{min-width:9rem;font-variant-numeric:tabular-nums}
summary{cursor:pointer;padding:.35rem 0;color:var(--link)}
[hidden]{display:none!important}
@media (max-width:34rem){body{font-size:15px}header,main,footer{padding-left:1rem;padding-right:1rem}
 h1{font-size:1.45rem}.pairs div{grid-template-columns:1fr;gap:0}.tiles{grid-template-columns:1fr 1fr}
 .tiles dd{font-size:1.15rem}}
@media print{body{font-size:10.5pt}header,main,footer{max-width:none;padding-left:0;padding-right:0}
 nav,.slide input,.skip{display:none}h2,h3,figcaption,caption{break-after:avoid}
 figure,tr,.tiles,.next,.warn{break-inside:avoid}.wide{overflow:visible}td,th{max-width:none}
 .charts{grid-template-columns:1fr 1fr}a{color:inherit;text-decoration:none}}
"""
)

SCRIPT = """
document.querySelectorAll(".slider").forEach(function (box) {
  var input = box.querySelector("input"), output = box.querySelector("output");
  var panels = box.querySelectorAll("figure");
  function show() {
    panels.forEach(function (panel, number) { panel.hidden = number !== Number(input.value); });
    var words = panels[Number(input.value)].getAttribute("data-when");
    output.textContent = words;
    input.setAttribute("aria-valuetext", words);
  }
  box.querySelector(".slide").hidden = false;
  input.addEventListener("input", show);
  show();
});
"""
"""Shows one panel of each slider. Without it the last one is seen, and no slider."""
