"""What `make_readme.py` and `make_docs.py` share: notebooks as nbdev's processors leave them, and Markdown of their cells

Stored outputs are used as they are: nothing is run.
"""
import base64, json, re, runpy
from pathlib import Path
from urllib.parse import urljoin

import pypandoc, yaml
from nbdev import processors as P
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import NbdevLookup
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor

root = Path(__file__).resolve().parent.parent
nbs = root/'nbs'
image_types = {'image/svg+xml': 'svg', 'image/png': 'png', 'image/jpeg': 'jpg'}
# what takes out of a notebook all that its directives hide, as in the docs
hiding = [FrontmatterProc, P.populate_language, P.strip_ansi, P.hide_line, P.filter_stream_, P.rm_header_dash,
          P.rm_export, P.clean_magics, P.hide_]

def pandoc(text, to, fmt, *args): return pypandoc.convert_text(text, to, format=fmt, extra_args=['--wrap=none', *args])

def fenced(text, lang=''):
    fence = '`' * max([3, *(len(o)+1 for o in re.findall('`{3,}', text))])  # longer than any fence inside
    return f'{fence}{lang}\n{text.rstrip()}\n{fence}'

def notebooks():
    "Path from nbs/ of every notebook that has a page"
    paths = (p.relative_to(nbs) for p in sorted(nbs.glob('**/*.ipynb')))
    return [p.as_posix() for p in paths if not any(o.startswith(('.', '_')) for o in p.parts)]

def page_of(path): return nbpath2html(Path(path)).as_posix()

def sidebar():
    "Title of a section, or None, and the notebooks in it, in the order of nbs/sidebar.yml"
    contents = yaml.safe_load((nbs/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    return [(None, [o]) if isinstance(o, str) else (o['section'], o['contents']) for o in contents]

def lookup():
    """nbdev's links from symbols to docs, for our symbols alone and from this checkout

    By itself nbdev takes them from every installed package, so that what is written would depend on what is installed."""
    links = NbdevLookup(incl_libs=('fastbyol',))
    modules = runpy.run_path(str(root/'fastbyol/_modidx.py'))['d']['syms']
    doc_url = get_config().doc_url
    links.syms = {}
    for module, syms in modules.items():
        for name, (page, _) in syms.items():
            for o in (name, name.removeprefix(f'{module}.')): links.syms.setdefault(o, urljoin(doc_url, page))
    return links

def processed(path, procs=hiding):
    "The notebook at `path` from nbs/, without what its directives hide"
    return NBProcessor(nbs/path, procs, process=True).nb

def about(path):
    "Title and description of the notebook at `path`"
    fm = processed(path, [FrontmatterProc]).frontmatter_
    return fm['title'], fm.get('description', '')

def shown(text):
    "What is left to see of `text` after a progress bar has written over its lines"
    return '\n'.join(o.split('\r')[-1] for o in text.rstrip().split('\n'))

def output_md(out, stem, files, links, table):
    "Markdown of one stored output; a picture goes into `files` as `stem` with its suffix; `table` makes Markdown of HTML"
    if out.output_type=='stream': return fenced(shown(out.text))
    if out.output_type=='error': return fenced(f'{out.ename}: {out.evalue}')
    data = out.data
    if 'text/markdown' in data: return links.linkify(data['text/markdown'])
    for mime, suffix in image_types.items():
        if mime not in data: continue
        path = f'{stem}.{suffix}'
        files[path] = data[mime].encode() if suffix=='svg' else base64.b64decode(data[mime])
        return f'![]({path})'
    # a table, in what pandas and fastprogress wrap around it
    if 'text/html' in data: return table(re.sub(r'<(style|script).*?</\1>', '', data['text/html'], flags=re.S))
    return fenced(data['text/plain']) if 'text/plain' in data else ''

def cell_md(cell, stem, files, links, table):
    "Markdown of a cell: its source and each of its outputs; pictures go into `files`, their names beginning with `stem`"
    if cell.cell_type=='markdown':
        if cell.get('attachments'): raise ValueError(f'Cell {cell.id} has a pasted picture: save it in nbs/images/ and link to it')
        yield links.linkify(cell.source)
    if cell.cell_type!='code': return
    off = lambda key: cell.directives_.get(key)=='false'
    if off('include'): return
    if not off('echo') and cell.source.strip(): yield fenced(cell.source, cell.metadata.language)
    if off('output'): return
    for i, out in enumerate(cell.outputs): yield output_md(out, f'{stem}{cell.id}-{i}', files, links, table)

def relocate(node, target):
    "Replace the address of every link and picture in a Pandoc tree by `target` of it"
    if isinstance(node, list):
        for o in node: relocate(o, target)
    elif isinstance(node, dict):
        if node.get('t') in ('Link', 'Image'): node['c'][2][0] = target(node['c'][2][0])
        if node.get('t') in ('RawInline', 'RawBlock'):
            node['c'][1] = re.sub(r'((?:src|href)=")([^"]+)', lambda m: m[1]+target(m[2]), node['c'][1])
        for o in node.values(): relocate(o, target)

def tree_of(parts, fmt):
    "Pandoc's tree of pieces of Markdown"
    return json.loads(pandoc('\n\n'.join(o.strip('\n') for o in parts if o.strip()), 'json', fmt))
