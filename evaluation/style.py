"""The page's one style sheet: dark and light as the reader's system has it, narrow screens, paper."""

STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1c1c1e;--muted:#6b6b70;--line:#d4d4d8;--soft:#f4f4f5;
--good:#0067a3;--bad:#c43d00;--bad-soft:#fdeee7;--good-soft:#e6f2f9;--wait:#7a5b00;--wait-soft:#fbf3dc}
@media screen and (prefers-color-scheme:dark){:root{--page:#16171a;--ink:#e8e8ea;--muted:#a0a0a8;--line:#3a3b40;
--soft:#202226;--good:#62b5e8;--bad:#ff8a5c;--bad-soft:#3a2219;--good-soft:#172c39;--wait:#e8c45a;--wait-soft:#332b15}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.6rem;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.5rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--line)}
p{margin:.5rem 0;overflow-wrap:anywhere}.quiet,figcaption{color:var(--muted);font-size:.9rem}
.verdict{margin:1rem 0;padding:.75rem 1rem;border-left:.4rem solid;border-radius:.25rem;overflow-wrap:anywhere}
.verdict ul{margin:.25rem 0;padding-left:1.2rem}.verdict li,.verdict p{color:var(--ink)}
.verdict .said{margin:0;font-size:1.4rem;font-weight:700;color:inherit}
.passed{color:var(--good);background:var(--good-soft)}.rejected{color:var(--bad);background:var(--bad-soft)}
.waiting{color:var(--wait);background:var(--wait-soft)}.unjudged{color:var(--muted);background:var(--soft)}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.5rem 1rem;margin:1rem 0}
dl div{min-width:0}dt{color:var(--muted);font-size:.85rem;overflow-wrap:anywhere}dd{margin:0;overflow-wrap:anywhere}
.tiles div{padding:.5rem .75rem;background:var(--soft);border-radius:.25rem}.tiles dd{font-size:1.2rem;font-weight:600}
.lineage{grid-template-columns:1fr;gap:.25rem}.lineage div{display:grid;grid-template-columns:11rem 1fr;gap:1rem}
.lineage dd{font-family:ui-monospace,monospace;font-size:.85rem}
.wide{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--muted);padding-bottom:.25rem}
th,td{border-bottom:1px solid var(--line);padding:.35rem .6rem;text-align:left;vertical-align:top}
th{font-weight:600}thead th{color:var(--muted);white-space:nowrap}tbody th,td{overflow-wrap:anywhere;min-width:4rem}
.number{text-align:right}.number,.short{white-space:nowrap}.failed{background:var(--bad-soft)}.chosen{background:var(--good-soft)}
.failed th{color:var(--bad)}
@media screen and (min-width:52rem){td:last-child:not(.number,.short,:empty){min-width:15rem}}
figure{margin:1rem 0}svg{display:block;max-width:none;height:auto;font-family:inherit}
svg path,svg use{stroke-linejoin:round}
summary{cursor:pointer;color:var(--muted)}
@media (max-width:44rem){.stacked,.stacked tbody,.stacked tr,.stacked th,.stacked td{display:block;width:auto}
.stacked caption{display:block}.stacked thead{position:absolute;clip-path:inset(50%);width:1px;height:1px}
.stacked tr{border-bottom:1px solid var(--line);padding:.5rem .6rem}
.stacked th,.stacked td{border:0;padding:.1rem 0;text-align:left;white-space:normal;min-width:0}
.stacked td:not(:empty)::before{content:attr(data-head) ": ";color:var(--muted)}
.lineage div{grid-template-columns:1fr;gap:0}.lineage div+div{margin-top:.4rem}}
@media print{main{max-width:none;padding:0}.wide{overflow:visible}svg{min-width:0}
details:not([open])::details-content{content-visibility:visible}tr,figure,.verdict{break-inside:avoid}h2{break-after:avoid}.verdict,.failed,.chosen{print-color-adjust:exact}}
"""
