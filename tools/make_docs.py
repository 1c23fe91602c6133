"""Build the pages of the docs in _docs/, from the notebooks as nbdev processes them, with Pandoc

    python tools/make_docs.py

Quarto, which builds the published site, cannot be installed everywhere; this needs nothing but Python packages. The
addresses of the pages and the anchors in them are Quarto's. Stored outputs are used as they are: nothing is run, but the
modules are imported for the documentation of their symbols. The pages need no network.
"""
import html, importlib, inspect, itertools, json, os, posixpath, re, shutil, textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from fastcore.docments import ShowDocRenderer, empty
from nbdev import processors as P
from nbdev.config import get_config
from nbdev.readme_filter import doc_link
from notebooks import about, cell_md, fenced, hiding, lookup, nbs, notebooks, page_of, pandoc, processed, relocate, root, sidebar, tree_of

parts_dir = root/'tools/docs'

class show_docs(P.add_show_docs):
    "nbdev's cells of `show_doc` after those that export, in the order of the definitions, where nbdev's is from last to first"
    def begin(self):
        super().begin()
        groups = [[*g] for _,g in itertools.groupby(self.nb.cells, lambda o: o.get('has_sd', False))]
        self.nb.cells = [o for g in groups for o in (reversed(g) if g[0].get('has_sd') else g)]

procs = [*hiding[:2], show_docs, *hiding[2:]]
reader = 'markdown-citations-implicit_figures'  # Quarto's Markdown; our text has an @ where Python has one

def relative(url, page): return posixpath.relpath(url, posixpath.dirname(page) or '.')

def local(url, page):
    "Address from `page` of what its notebook links to as `url`, or what is in our docs on the web"
    doc_url = get_config().doc_url
    if not url.startswith(doc_url) and re.match(r'\w+:|#|/', url): return url
    if not url.startswith(doc_url): url = posixpath.normpath(posixpath.join(posixpath.dirname(page), url))
    u = urlsplit(doc_link(url, doc_url).removeprefix(doc_url))
    return urlunsplit(('', '', relative(u.path or 'index.html', page), u.query, u.fragment))

# --- documentation of symbols

def plain(text): return re.sub(r'`([^`]+)`', r'<code>\1</code>', html.escape(str(text), quote=False))

def type_name(anno):
    if anno in (empty, None, type(None)): return ''  # the last is what docments makes of a default of None
    return re.sub(r'\b[a-z_]\w*\.(?=\w)', '', anno if isinstance(anno, str) else inspect.formatannotation(anno))  # without modules

def default_name(o):
    if o is empty: return ''
    return getattr(o, '__name__', None) or re.sub(r'\d+\.\d{6,}', lambda m: f'{float(m[0]):.4g}', repr(o))  # 4/3 has many digits

def starred(k, p): return {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}.get(p.get('kind'), '') + k

def signature(name, params):
    args = [starred(k, p) + ('' if p['default'] is empty else f'={default_name(p["default"])}') for k,p in params.items()]
    # of what is inherited from another library, as the 24 events of a `Callback` are, nobody wants to know
    if len(args)>12 and not any(p['docment'] for p in params.values()): args = ['…']
    one = f'{name}({", ".join(args)})'
    if len(one)<=88: return one
    # a space within a default is no place for a break
    return '\n'.join(textwrap.wrap(', '.join(o.replace(' ', '\0') for o in args), 84, initial_indent=f'{name}(', subsequent_indent='    ',
                                   break_long_words=False, break_on_hyphens=False)).replace('\0', ' ') + ')'

def symbol_table(params, ret):
    "A row for each parameter and for what is returned, with type, default and meaning"
    code = lambda o: f'<code>{html.escape(o)}</code>' if o else ''
    if not any(p['docment'] for p in [*params.values(), ret or {'docment':None}]): return ''
    named = any(p['default'] is not empty for p in params.values())  # else no column of defaults
    rows = [(f'<code>{starred(k, p)}</code>', code(type_name(p['anno'])), code(default_name(p['default'])), plain(p['docment'] or ''))
            for k,p in params.items() if p['docment'] or not starred(k, p).startswith('*')]
    if ret and (type_name(ret['anno']) or ret['docment']): rows.append(('<em>returns</em>', code(type_name(ret['anno'])), '', plain(ret['docment'] or '')))
    pick = lambda row: [o for i,o in enumerate(row) if named or i!=2]
    head = ''.join(f'<th>{o}</th>' for o in pick(('', 'Type', 'Default', 'Meaning')))
    body = '\n'.join('<tr>' + ''.join(f'<td>{o}</td>' for o in pick(r)) + '</tr>' for r in rows)
    return f'```{{=html}}\n<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>\n```'

def source_url(sym):
    cfg = get_config()
    file = Path(inspect.getsourcefile(sym)).resolve()
    return f'{cfg.git_url}/blob/{cfg.branch}/{file.relative_to(root).as_posix()}#L{inspect.getsourcelines(sym)[1]}'

def symbol_md(name, level, module, links):
    "Markdown of the documentation of `name`: heading, signature, docstring, table"
    sym = eval(name, vars(module))
    r = ShowDocRenderer(sym, name=name)
    dm = {k:{'anno':empty, 'default':empty, 'docment':None, **v} for k,v in r.dm.dm.items()}
    ret = dm.pop('return', None)
    params = {k:v for k,v in dm.items() if k!='self'}
    return [f'::: {{.doc}}\n\n{"#"*level} `{name}` {{.symbol}}\n\n[source]({source_url(r.sym)}){{.src}}',
            fenced(signature(name, params), 'python'), links.linkify(r.docs) or '', symbol_table(params, ret), ':::']

# --- a page

def table_md(text): return f'```{{=html}}\n{text.strip()}\n```'

def parts_of(nb, page, files, links):
    "Pieces of Markdown of a processed notebook"
    module = (found := P._default_exp(read(nb.path_))) and importlib.import_module(f'fastbyol.{found}')
    stem = Path(page).stem + '_files/'
    for cell in nb.cells:
        if cell.cell_type=='code' and (m := re.match(r'show_doc\(([\w.]+)(?:.*title_level=(\d))?', cell.source)): yield from symbol_md(m[1], int(m[2] or 3), module, links)
        elif cell.cell_type=='code':
            source, *outputs = [*cell_md(cell, stem, files, links, table_md)] or ['']
            if 'echo' in cell.directives_: source, outputs = '', [source, *outputs]
            yield source
            for o in outputs:
                if o: yield f'::: {{.cell-output}}\n\n{o}\n\n:::'
        else: yield from cell_md(cell, stem, files, links, table_md)

def read(path): return P.read_nb(path)

def text_of(node):
    "The plain text in a Pandoc tree"
    if isinstance(node, list): return ''.join(map(text_of, node))
    if not isinstance(node, dict): return ''
    t, c = node['t'] if 't' in node else None, node.get('c')
    if t=='Str': return c
    if t in ('Space', 'SoftBreak', 'LineBreak'): return ' '
    if t in ('Code', 'Math', 'CodeBlock'): return c[1] + (' ' if t=='CodeBlock' else '')
    if t=='RawBlock': return html.unescape(re.sub(r'<[^>]+>', ' ', c[1]))
    return text_of(c) + (' ' if t in ('Para', 'Plain', 'Header', 'Div') else '') if c is not None else ''

def flat(blocks):
    "Blocks in order, those inside of divs, too"
    for o in blocks:
        if o['t']=='Div': yield from flat(o['c'][1])
        else: yield o

def sections(blocks, title, page):
    "[title of the page, heading, address, text] of each section, for search"
    res = [[title, title, page, '']]
    for o in flat(blocks):
        if o['t']=='Header': res.append([title, text_of(o['c'][2]).strip(), f'{page}#{o["c"][1][0]}', ''])
        else: res[-1][3] += text_of(o) + ' '
    for o in res: o[3] = re.sub(r'\s+', ' ', o[3]).strip()
    return res

def finish_headings(blocks):
    "Give the anchor of a symbol to its documentation, not to a heading of the same name"
    heads = [o for o in flat(blocks) if o['t']=='Header']
    is_symbol = lambda o: 'symbol' in o['c'][1][1]
    symbols = set()
    for o in filter(is_symbol, heads):
        name = text_of(o['c'][2]).strip().lower()
        o['c'][1][0] = f'{name}-1' if name in symbols else name  # `Recipe`, then `recipe`
        symbols.add(o['c'][1][0])
    for o in heads:
        if not is_symbol(o) and o['c'][1][0] in symbols: o['c'][1][0] += '-section'

def sidebar_html(page, titles):
    rows = []
    for section, paths in sidebar():
        if section: rows.append(f'<p>{html.escape(section)}</p>')
        rows.append('<ul>')
        for o in paths:
            if o not in titles: continue
            to, here = page_of(o), ' aria-current="page"' if page_of(o)==page else ''
            rows.append(f'<li><a href="{relative(to, page)}"{here}>{html.escape(titles[o][0])}</a></li>')
        rows.append('</ul>')
    return '\n'.join(rows)

def turn_html(path, titles, page):
    "Links to the page before and the page after"
    order = [o for _,paths in sidebar() for o in paths if o in titles]
    i = order.index(path) if path in order else None
    if i is None: return ''
    pairs = [('prev', '← ', '', i-1), ('next', '', ' →', i+1)]
    return '\n'.join(f'<a class="{cls}" href="{relative(page_of(order[j]), page)}">{a}{html.escape(titles[order[j]][0])}{b}</a>'
                     for cls,a,b,j in pairs if 0<=j<len(order))

def inline(text): return pandoc(text, 'html', 'markdown-citations').strip().removeprefix('<p>').removesuffix('</p>')

def make_page(path, titles, links):
    "Files of the page of the notebook at `path`, by their path in the docs, and its sections"
    cfg, page, files = get_config(), page_of(path), {}
    title, description = titles[path]
    nb = processed(path, procs)
    tree = tree_of(parts_of(nb, page, files, links), reader)
    finish_headings(tree['blocks'])
    found = sections(tree['blocks'], title, page)
    relocate(tree['blocks'], lambda o: local(o, page))
    plain_description = text_of(tree_of([description], reader)['blocks']).strip() if description else ''
    up = '../' * page.count('/')
    variables = dict(pagetitle=html.escape(title if path=='index.ipynb' else f'{title} – {cfg.lib_name}'), description=html.escape(plain_description),
        heading=inline(title), lead=inline(description) if description else '', url=cfg.doc_url+page, card=cfg.doc_url+'images/card.png',
        site=cfg.lib_name, repo=cfg.git_url, source=f'{cfg.git_url}/blob/{cfg.branch}/nbs/{path}', root=up,
        sidebar=sidebar_html(page, titles), turn=turn_html(path, titles, page))
    text = pandoc(json.dumps(tree), 'html5', 'json', '--standalone', f'--template={parts_dir/"page.html"}', '--mathml', '--toc', '--toc-depth=3',
                  *(f'--variable={k}={v}' for k,v in variables.items()))
    text = re.sub(r'(<h[234][^>]* id="([^"]+)"[^>]*>)(.*?)(</h[234]>)', r'\1\3<a class="anchor" href="#\2" aria-label="Link to this place">#</a>\4', text)
    base = posixpath.dirname(page)
    made = {page: text.encode(), **{posixpath.join(base, k):v for k,v in files.items()}}
    # the page as Markdown, as Quarto's format commonmark gives it: llms.txt and the docstrings of modules link to it
    top = [f'# {title}', f'> {description}' if description else '']
    made[f'{page}.md'] = ('\n\n'.join(o for o in top if o) + '\n\n' + pandoc(json.dumps(tree), 'gfm-raw_html', 'json')).encode()
    return made, found

def make_docs():
    "Path -> bytes of everything in _docs/"
    links = lookup()
    paths = notebooks()
    titles = {o: about(o) for o in paths}
    import fastbyol.all  # once, before threads ask for it
    with ThreadPoolExecutor(os.cpu_count()) as ex: res = [*ex.map(lambda o: make_page(o, titles, links), paths)]
    files = {k:v for made,_ in res for k,v in made.items()}
    index = sorted((o for _,found in res for o in found), key=lambda o: o[2])
    files['site/search.js'] = f'const searchIndex = {json.dumps(index, ensure_ascii=False)}\n'.encode()
    files['site/style.css'] = (nbs/'styles.css').read_bytes() + (parts_dir/'style.css').read_bytes()
    for o in ('site.js', 'icon.svg'): files[f'site/{o}'] = (parts_dir/o).read_bytes()
    for o in sorted((nbs/'images').iterdir()): files[f'images/{o.name}'] = o.read_bytes()
    files['llms.txt'] = (nbs/'llms.txt').read_bytes()
    return files

def write(files, to):
    shutil.rmtree(to, ignore_errors=True)
    for path, data in files.items():
        (to/path).parent.mkdir(parents=True, exist_ok=True)
        (to/path).write_bytes(data)

if __name__=='__main__':
    os.chdir(root)  # nbdev looks for its settings from the working directory
    files = make_docs()
    write(files, root/'_docs')
    print(f'{sum(o.endswith(".html") for o in files)} pages in _docs/: open _docs/index.html')
