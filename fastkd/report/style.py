"""How a page looks: one sheet, inline, for light and dark, from a phone's width up."""

from .plots import COLOURS, GREY, GRID, INK


def sheet() -> str:
    """The style sheet."""
    return _SHEET.replace("/*light*/", _variables(0)).replace("/*dark*/", _variables(1))


def _variables(which: int) -> str:
    colours = "".join(f"--s{i}:{pair[which]};" for i, pair in enumerate(COLOURS))
    return f"--ink:{INK[which]};--grid:{GRID[which]};--grey:{GREY[which]};{colours}"


_SHEET = """
:root{color-scheme:light dark;/*light*/
--page:#f7f8fa;--card:#fff;--line:#dfe3e8;--soft:#f0f3f6;--good:#00694c;--bad:#b23a00;--mark:#fff6dc}
@media (prefers-color-scheme:dark){:root{/*dark*/
--page:#0f1215;--card:#171b20;--line:#2b3138;--soft:#1f252b;--good:#4fd0a6;--bad:#f59a63;--mark:#2e2a1a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
main,header,footer{max-width:1200px;margin:0 auto;padding:0 24px}
header{padding-top:36px}
h1{font-size:28px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:19px;margin:44px 0 14px;letter-spacing:-.005em}
h3{font-size:14px;margin:0 0 6px;font-weight:600}
p{margin:0 0 12px;max-width:76ch}
.lead{color:var(--grey);margin:0;max-width:90ch}
.aside,figcaption,caption,dl,footer{color:var(--grey);font-size:13px}
footer{padding-top:28px;padding-bottom:40px}
section>*+*{margin-top:16px}
section>h2+*{margin-top:0}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:14px}
header+main section:first-child{margin-top:26px}
.card,.panel,.fold,.example{background:var(--card);border:1px solid var(--line);border-radius:10px}
.card{padding:14px 16px;display:flex;flex-direction:column}
.card .what{color:var(--grey);font-size:13px}
.card .figure{font-size:28px;line-height:1.25;font-weight:600;letter-spacing:-.01em;font-variant-numeric:tabular-nums}
.card .more{font-size:13px;color:var(--grey)}
.good{color:var(--good)}.bad{color:var(--bad)}.card .more.good{color:var(--good);font-weight:600}
.card .more.bad{color:var(--bad);font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:4px 20px;font-size:13px;margin:18px 0 0;padding:0;list-style:none}
section>h2+.legend{margin-top:0}
.legend li{display:flex;align-items:center;gap:7px}
.key{flex:none;width:26px;height:10px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:14px}
.charts.one{grid-template-columns:minmax(0,460px)}
.panel{padding:14px 14px 12px;margin:0}
.panel svg{display:block;width:100%;height:auto;margin:2px 0 6px}
svg{stroke-linejoin:round;stroke-linecap:butt}
figcaption{line-height:1.4}
.table{background:var(--card);border:1px solid var(--line);border-radius:10px;overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:9px 11px;text-align:right;vertical-align:baseline;border-top:1px solid var(--line)}
thead th,td{overflow-wrap:normal}td.words{overflow-wrap:anywhere}
thead th{border-top:0;font-size:13px;font-weight:600;vertical-align:bottom;line-height:1.3}
thead small{display:block;font-weight:400;color:var(--grey);white-space:nowrap}
th:first-child,td.words,th.words{text-align:left}
tbody th{font-weight:600;min-width:120px}
tbody th small{display:block;font-weight:400;color:var(--grey)}
td .value{white-space:nowrap}
td.words .value{white-space:normal}
td small{display:block;color:var(--grey);white-space:nowrap;font-size:12.5px}
td small.good,td small.bad{color:inherit}
td.good,td.good small.word{color:var(--good)}td.bad,td.bad small.word{color:var(--bad)}
td.off .value{color:var(--grey)}
tr.mark th,tr.mark td{background:var(--mark)}
.caption{color:var(--grey);font-size:13px;max-width:100ch;margin-top:8px}
details.fold{padding:0}
summary{cursor:pointer;padding:10px 14px;font-size:14px}
.fold .table{border:0;border-top:1px solid var(--line);border-radius:0 0 10px 10px}
dl{display:grid;grid-template-columns:minmax(110px,max-content) 1fr;gap:6px 18px;margin:0}
dt{font-weight:600;color:var(--ink)}dd{margin:0;max-width:90ch}
.fold dl{padding:4px 14px 14px}
pre{margin:0;padding:12px 14px;background:var(--soft);border:1px solid var(--line);border-radius:10px;
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap}
.bars{display:grid;grid-template-columns:max-content minmax(0,1fr) max-content;gap:3px 10px;font-size:13px;
align-items:center;font-variant-numeric:tabular-nums}
.bars .name{max-width:150px;overflow:hidden;text-overflow:ellipsis;white-space:pre}
.bars .text{text-align:right;color:var(--grey)}
.bar{height:9px;background:var(--soft);border-radius:3px;overflow:hidden}
.bar i{display:block;height:100%;background:var(--s0);border-radius:3px}
.example{padding:14px 16px}
.example+.example{margin-top:14px}
.prefix{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;margin:0 0 12px;
padding-left:12px;border-left:3px solid var(--line);max-width:none}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(250px,100%),1fr));gap:16px 26px}
.answers .bars .name{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.completion{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;margin:10px 0 0}
@media (max-width:700px){
main,header,footer{padding-left:14px;padding-right:14px}
header{padding-top:22px}
h1{font-size:23px}
.cards{grid-template-columns:1fr 1fr;gap:10px}
.card{padding:11px 12px}.card .figure{font-size:22px}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}
.wide thead{display:none}
.wide tr{display:grid;grid-template-columns:1fr 1fr;padding:10px 12px 12px;border-top:1px solid var(--line);
gap:7px 14px}
.wide tbody tr:first-child{border-top:0}
.wide th,.wide td{display:block;border:0;padding:0;text-align:left}
.wide tbody th{grid-column:1/-1}
.wide tr.mark{background:var(--mark)}
.wide td::before{content:attr(data-name);display:block;font-size:12px;color:var(--grey)}
}
@media print{body{background:#fff}.card,.panel,.table,.example{break-inside:avoid}}
"""
