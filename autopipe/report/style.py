"""The page's style sheet: light, dark and on paper."""

STYLE = """
:root{color-scheme:light dark;
--paper:#f6f6f3;--card:#fff;--ink:#1b1d22;--faint:#646872;--rule:#e1e1dc;--grid:#ecece7;
--track:#e6e7ea;--F:#2b6cb0;--R:#e6b450;--B:#bf5426;--W:#7a4f9e;
--P:#2f7f7b;--O:#c2a35a;--K:#8a5fb0;--A:#b9bec8;
--accent:#2b6cb0;--skip:#8a5fb0;--shared:#2f7f7b;--bad:#b3261e;--idle:#efefec}
@media (prefers-color-scheme:dark){:root{
--paper:#14161a;--card:#1c1f24;--ink:#e8e9ec;--faint:#9da2ad;--rule:#31353d;--grid:#2a2e35;
--track:#343943;--F:#4285cf;--R:#d9a741;--B:#cb6238;--W:#9a6cc4;
--P:#3d9a95;--O:#8f7638;--K:#a57dcb;--A:#596070;
--accent:#6ba6e8;--skip:#b492d8;--shared:#54b5af;--bad:#ff8a80;--idle:#23272d}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1272px;margin:0 auto;padding:36px 24px 56px}
header{margin:0 0 22px}
h1{font-size:27px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:17px;margin:0 0 2px}
h3{font-size:13.5px;margin:10px 0 0}
p{margin:0 0 12px;max-width:76ch}
.lead,.note{color:var(--faint)}
.note{font-size:13.5px}
section{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:20px 23px;
margin:0 0 18px;min-width:0}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:18px}
.pair>section{margin:0}
.pair{margin:0 0 18px}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(158px,1fr));gap:12px;margin:0 0 18px}
dl>div{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:13px 16px}
dt{color:var(--faint);font-size:13px}
dd{margin:0;font-size:24px;line-height:1.25;font-weight:600;font-variant-numeric:tabular-nums}
dd small{display:block;font-size:12.5px;font-weight:400;color:var(--faint);line-height:1.35}
.scroll{overflow-x:auto;max-width:100%}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.scroll+.scroll,.scroll+.notes{margin-top:14px}
svg{display:block;width:100%;height:auto;font:12px system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
svg text{fill:var(--ink)}
svg .small{font-size:11px}svg .tiny{font-size:10.5px}svg .faint{fill:var(--faint)}
svg .strong{font-weight:600}svg .over{fill:var(--bad);font-weight:600}
svg .halo{paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
.box,.caller{fill:var(--card);stroke:var(--ink);stroke-width:1.2;rx:6px}
.caller{stroke:var(--faint);stroke-dasharray:2 3}
.track{fill:var(--track);rx:3px}.load{fill:var(--accent);rx:3px}
.line{fill:none;stroke:var(--accent)}.head{fill:var(--accent)}
.arc .line{stroke:var(--skip)}.arc .head{fill:var(--skip)}
.shared .line{stroke:var(--shared);stroke-dasharray:5 4}.shared .head{fill:var(--shared)}
.grid{stroke:var(--grid);fill:none}.idle{fill:var(--idle)}
.limit{stroke:var(--bad);stroke-width:1.6;stroke-dasharray:5 3;fill:none}
.bound{stroke:var(--faint);stroke-dasharray:4 4;fill:none}
.curve{stroke:var(--accent);stroke-width:2;fill:none;stroke-linejoin:round}
.dot{fill:var(--card);stroke:var(--accent);stroke-width:2}.dot.own{fill:var(--accent)}
svg .own{font-weight:600}
.F{fill:var(--F);background:var(--F)}.R{fill:var(--R);background:var(--R)}
.B{fill:var(--B);background:var(--B)}.W{fill:var(--W);background:var(--W)}
.P{fill:var(--P);background:var(--P)}.K{fill:var(--K);background:var(--K)}
.A{fill:var(--A);background:var(--A)}
.O{fill:var(--O);background:var(--O)}
.legend .idle{background:var(--idle);box-shadow:inset 0 0 0 1px var(--rule)}
.odd{fill-opacity:.86}
.wait{fill:var(--A);fill-opacity:.55;background:var(--A)}
.pause{fill:var(--A);fill-opacity:.25;stroke:var(--faint);stroke-dasharray:2 3;
background:var(--rule)}
svg .n{font-size:10px;fill:#fff;pointer-events:none}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 16px;margin:0 0 10px;padding:0;
font-size:13px;color:var(--faint)}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--faint);padding:0 0 8px}
th,td{padding:5px 10px;text-align:right;border-top:1px solid var(--rule);vertical-align:top}
thead th{border-top:0;color:var(--faint);font-weight:500;white-space:nowrap}
tbody th{font-weight:600}
th:first-child,td:first-child{padding-left:2px}
.w{text-align:left}
td:not(.w){white-space:nowrap}
td.w{min-width:10ch}
.enlarge{color:var(--faint);font-size:13px;float:right}
section:has(.enlarge input:checked) svg{width:360%;max-width:none!important}
code{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere;
unicode-bidi:isolate}
td.w code,th.w code{display:inline-block;min-width:12ch;max-width:46ch}
.names code{margin-right:2px}
.names{max-width:none}
details{margin:8px 0}
summary{cursor:pointer;color:var(--faint);font-size:13.5px}
details[open]>summary{margin-bottom:8px}
ul.notes{margin:0;padding-left:20px}
footer{color:var(--faint);font-size:13px;overflow-wrap:anywhere}
@media (max-width:900px){.pair{grid-template-columns:1fr}main{padding:22px 14px}
section{padding:16px 15px}}
@media screen and (max-width:700px){thead{display:none}
table,caption,tbody,tr,tbody th,td{display:block}tbody tr{border-top:1px solid var(--rule);
padding:5px 0}tbody th,td,td:not(.w){border:0;display:flex;gap:10px;padding:1px 2px;text-align:left;
white-space:normal}tbody th::before,td::before{content:attr(data-label);color:var(--faint);
font-weight:400;flex:0 0 11em}td.w code,th.w code{min-width:0}}
@media print{:root{color-scheme:light;--paper:#fff;--card:#fff;--ink:#000;--faint:#444;--rule:#ccc;
--grid:#ddd;--track:#ddd;--F:#2b6cb0;--R:#e6b450;--B:#bf5426;--W:#7a4f9e;
--P:#2f7f7b;--O:#c2a35a;
--K:#8a5fb0;--A:#b9bec8;--accent:#2b6cb0;--skip:#8a5fb0;--shared:#2f7f7b;--bad:#b3261e;--idle:#eee}
body{font-size:11px;-webkit-print-color-adjust:exact;print-color-adjust:exact}
main{max-width:none;padding:0}section{break-inside:avoid;border:0;padding:0}
@page{margin:12mm}.pair{grid-template-columns:1fr 1fr}
h2{break-after:avoid}.enlarge{display:none}
section.long{break-inside:auto}svg{min-width:0!important}.scroll{overflow:visible}
tr{break-inside:avoid}thead{display:table-header-group}table{font-size:9px}dd{font-size:17px}
th,td{padding:2px 4px}code{font-size:8px}}
"""
