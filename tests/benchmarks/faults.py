"""Plants faults one by one in a copy of the package, and says which no test finds.

    python tests/benchmarks/faults.py [--only WORD] [--first N] [--list]

For maintainers: it takes half an hour. A fault is a file, a piece of it that stands there once, what is put in its
place, and the tests that should die of it. A survivor is a missing test; a fault whose place is gone is said too, and
wants to be planted anew where the code has moved to."""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WIRING = 'tests/test_wiring.py'
OWN = 'tests/test_own_video.py'

FAULTS = [
    # MoCo
    ('moco', 'k = moco.keys(x_k)', 'k = moco.keys(x_q)', WIRING + ' -k second_view'),
    ('moco', "rate = opt.param_groups[0]['lr'] = lr_at(session.step, total, batch, r.lr)",
     'rate = lr_at(session.step, total, batch, r.lr)', WIRING + ' -k schedules'),
    ('parts/pretraining', 'peak,up = lr*batch/256', 'peak,up = lr', WIRING + ' -k schedules'),
    ('moco', 'if clip: nn.utils.clip_grad_norm_', 'if False: nn.utils.clip_grad_norm_', WIRING + ' -k long_gradient'),
    ('moco', 'scaler.scale(numbers[0]/len(pieces))', 'scaler.scale(numbers[0])', WIRING + ' -k pieces'),
    ('moco', 'places[:,None]!=self.places', 'places[:,None]==self.places', WIRING + ' -k same_video'),
    ('parts/pretraining', 'to_input(x[:,i], mean, std, device) for i in (0,1)',
     'to_input(x[:,0], mean, std, device) for i in (0,1)', WIRING + ' -k views'),
    ('moco', 'mean,std = store.mean.tolist(),store.std.tolist()', 'mean,std = [.5]*3,[.25]*3',
     WIRING + ' -k deviation'),
    ('parts/pretraining', "if positives=='track' else None", "if positives=='none' else None", WIRING + ' -k positive'),
    ('moco', 'others = q@queue', 'others = k@queue', 'tests/test_moco.py -k loss_by_hand'),
    ('moco', '(q*k).sum(1, keepdim=True), others], 1)/tau', '(q*k).sum(1, keepdim=True), others/tau], 1)',
     'tests/test_moco.py -k loss_by_hand'),
    ('moco', 'follow = get_ema_multi_avg_fn(min(self.m, (1+self.t)/(10+self.t)))', 'follow = get_ema_multi_avg_fn(1.)',
     'tests/test_moco.py -k momentum_update'),
    ('moco', 'self.queue[:,i:end] = k.T', 'self.queue[:,:end-i] = k.T', WIRING + ' -k queue'),
    ('moco', 'self.ptr = end%self.K', 'self.ptr = 0', WIRING + ' -k queue'),
    ('moco', "if self.bn=='momentum': self.encoder_k.eval()", 'pass', 'tests/test_moco.py -k batch'),
    ('parts/pretraining', '/max(1,total-up)))/2', '/max(1,2*total-up)))/2', 'tests/test_moco.py -k schedule'),
    ('moco', 'opt.zero_grad()\n    moco.enqueue', 'pass\n    moco.enqueue', WIRING + ' -k gradient'),
    # Views
    ('parts/augment', 'views = [self.augment.draw(sizes[k], rng) for k in (0,-1)]',
     'views = [self.augment.draw(sizes[0], rng)]*2', WIRING + ' -k views'),
    ('parts/device', 'return (-mean/std).to(device),(1/(255*std)).to(device)',
     'return (-mean).to(device),(1/(255*std)).to(device)',
     WIRING + ' -k deviation'),
    ('parts/augment', "order,shuffled = rng_of('order', seed, epoch)", "order,shuffled = rng_of('order', seed, 0)",
     WIRING + ' -k epochs'),
    ('parts/augment', 'others = others[others!=i]', 'others = others[others==i]', WIRING + ' -k positive'),
    ('parts/augment',
     'if view.flip: out = cv2.flip(out, 1)', 'if view.flip: out = cv2.flip(out, 0)', 'tests/test_views.py'),
    ('parts/augment', '(x+w-1,y+h-1), fill, -1)', '(x+w+2,y+h+2), fill, -1)', 'tests/test_views.py'),
    ('parts/augment', 'cos,sin = math.cos(2*math.pi*h),math.sin(2*math.pi*h)',
     'cos,sin = math.cos(math.pi*h),math.sin(math.pi*h)',
     'tests/test_views.py'),
    # Published weights
    ('parts/models', 'ceil=dict(ceil_mode=True))', 'ceil=dict(padding=1))', 'tests/test_published.py -k both_ways'),
    ('parts/models', 'width = width or channels//2', 'width = channels//2', 'tests/test_published.py -k both_ways'),
    ('parts/weights', "if resize!='area': return", 'if False: return', 'tests/test_published.py -k embeds_the_same'),
    ('parts/published', "resize='bicubic'", "resize='bilinear'", 'tests/test_published.py -k same_pictures'),
    ('parts/published', 'if theirs & head else', 'if False else', 'tests/test_published.py -k embeds_the_same'),
    ('parts/published', 'if sha256(path)!=e.sha256:', 'if False:', 'tests/test_published.py -k wrong_digest'),
    ('parts/published', "{int(m[1]) - 1}.{m[2]}", "{int(m[1])}.{m[2]}", 'tests/test_published.py -k both_ways'),
    # Calibrations
    ('parts/published', "known.get('inputs')==inputs_of(meta)", 'known', 'tests/test_calibrations.py -k known_file'),
    ('parts/published', 'if known and not beside.exists()', 'if known', 'tests/test_calibrations.py -k ones_own'),
    ('parts/published', 'dict(checkpoint_digest=sha256(out))', '{}', 'tests/test_calibrations.py -k known_file'),
    ('parts/published', 'Path(name).name   # the', 'name   # the', 'tests/test_calibrations.py -k same_file'),
    ('parts/weights', "known['checkpoint_digest'],calibration_words(known)", "known['checkpoint_digest']",
     'tests/test_calibrations.py -k one_line_of_the_command'),
    ('parts/scoring', 'dict(data=Path(data).resolve().name if data else None, ', 'dict(',
     'tests/test_calibrations.py -k where_and_when'),
    ('parts/drift', 'warning and f', 'warning or f', 'tests/test_calibrations.py -k drift'),
    ('parts/decisions', 'if outcome.calibration: lines', 'if False: lines', 'tests/test_calibrations.py -k an_answer'),
    ('biometrics', 'calibration=matcher.calibration', "calibration=''", 'tests/test_calibrations.py -k an_answer'),
    ('parts/supervised', "if stem!='padded':", 'if False:', 'tests/test_published.py -k fine_tuning'),
    ('parts/encoder', 'image[...,::-1]) if bgr', 'image) if bgr', 'tests/test_notebooks.py -k 31_encoder'),
    # Networks, heads, losses
    ('parts/models', 'one,other = x[:,:self.half],x[:,self.half:]', 'other,one = x[:,:self.half],x[:,self.half:]',
     WIRING + ' -k ibn'),
    ('parts/models', 'c.stride = (1,1)', 'c.stride = c.stride', 'tests/test_moco.py -k backbones'),
    ('parts/models', 'far.masked_fill(~same, 0).amax(1)', 'far.masked_fill(~same, 0).mean(1)', 'tests/test_heads.py'),
    ('parts/models', 'return far.masked_fill(~same, 0).amax(1),far.masked_fill(same, math.inf).amin(1)',
     'return far.masked_fill(same, math.inf).amin(1),far.masked_fill(~same, 0).amax(1)', 'tests/test_heads.py'),
    ('parts/models', 'label_smoothing=smoothing', 'label_smoothing=0', 'tests/test_heads.py'),
    ('parts/models',
     "side['after'].float() for branch in self.sides(x)", "side['before'].float() for branch in self.sides(x)",
     WIRING + ' -k embedding'),
    ('parts/models',
     'far = torch.where(own, 1+self.m-cos, cos+self.m)', 'far = torch.where(own, 1-self.m-cos, cos+self.m)',
     'tests/test_heads.py'),
    # Fine-tuning
    ('finetune', "for g in self.opt.param_groups: g['lr'] = lr", 'pass', WIRING + ' -k recipes_rate'),
    ('parts/supervised', "with seeded('pk', seed, epoch):", "with seeded('pk', seed, 0):", WIRING + ' -k epochs'),
    ('parts/supervised', 'img[y:y+h,x:x+w] = fill', 'img[y:y+h,x:x+w] = 0', WIRING + ' -k erasing'),
    ('parts/supervised', '(.02,.4), (.3,3.3))', '(.2,.9), (.3,3.3))', WIRING + ' -k erasing'),
    ('parts/supervised', 'return self.ema.module if self.ema else self.model', 'return self.model',
     WIRING + ' -k average'),
    ('parts/supervised', 'return self.lr*(self.start + (1-self.start)*at/self.warmup)', 'return self.lr',
     'tests/test_finetune.py -k published'),
    ('finetune', 'if r.clip: nn.utils.clip_grad_norm_', 'if False: nn.utils.clip_grad_norm_',
     'tests/test_finetune.py -k clipping'),
    ('parts/supervised', 'if init: transfer_weights(backbone, init, partial)', 'pass', WIRING + ' -k given'),
    ('parts/supervised', 'def frozen(self, step): return step<self.recipe.freeze*self.total',
     'def frozen(self, step): return False',
     'tests/test_finetune.py -k heads'),
    ('parts/supervised', 'self.train_mode(self.frozen(self.session.step))', 'pass', 'tests/test_finetune.py -k heads'),
    ('parts/weights', 'model.embed(x) + (model.embed(x.flip(3)) if flip else 0)', 'model.embed(x)',
     'tests/test_finetune.py -k load_and_embed'),
    ('parts/supervised', "mean,std = origin.get('mean', mean),origin.get('std', std)", 'pass',
     'tests/test_finetune.py -k travel'),
    # Sessions
    ('parts/training', "set_random_state(state['random'])", 'pass', 'tests/test_sessions.py'),
    ('parts/training',
     'if self.newest.exists(): os.replace(self.newest, self.before)', 'pass', 'tests/test_sessions.py'),
    ('parts/training', 'if damaged: raise', 'if False: raise', 'tests/test_sessions.py'),
    ('parts/training', "if isinstance(part, torch.optim.Optimizer): was['param_groups']",
     "if isinstance(part, torch.optim.Optimizer): continue; was['param_groups']", 'tests/test_finetune.py -k stop'),
    ('parts/training', 'able = was==', 'able = False and was==', 'tests/test_sessions.py'),
    ('parts/weights', "for k,v in tensors.items() if '.classifier.' not in k}", 'for k,v in tensors.items()}',
     'tests/test_small_model.py -k given_away'),
    ('parts/weights', 'v.half() if v.dim()>1 else v', 'v', 'tests/test_small_model.py -k given_away'),
    ('parts/weights', 'v.half() if v.dim()>1 else v', 'v.half()', 'tests/test_small_model.py -k given_away'),
    ('parts/weights', 'if table.missing: why', 'if False: why', 'tests/test_finetune.py -k "refused or donor"'),
    ('parts/weights', "state = torch.load(path, map_location='cpu', weights_only=True)",
     "state = torch.load(path, map_location='cpu', weights_only=False)", 'tests/test_finetune.py -k refused'),
    # Videos, boxes, crops
    ('parts/core', 'if not lives: f.unlink()', 'pass', 'tests/test_sessions.py -k swept'),
    ('parts/core', 'psutil.pid_exists(int(of[1]))', 'False', 'tests/test_sessions.py -k swept'),
    ('parts/video', 'x, y = (c, b) if turned else (a, d)', 'x, y = (b, c) if turned else (a, d)',
     'tests/test_video.py -k rotation'),
    ('parts/video', '::-1 if x < 0 else 1', '::1', 'tests/test_video_doors.py -k eight'),
    ('parts/video', "av.open(f'file:{video}', **OPEN)", 'av.open(str(video), **OPEN)',
     'tests/test_video_doors.py -k name'),
    ('parts/video', 'format_whitelist=FORMATS, ', '**{}, ', 'tests/test_video_doors.py -k "of_addresses and concat"'),
    ('parts/video', 'if size in (None, rgb.shape[:2]): return rgb', 'return rgb',
     'tests/test_video_doors.py -k one_size'),
    ('parts/video', 'for pts, discard, _ in packets if not discard]\n    if', 'for pts, discard, _ in packets]\n    if',
     'tests/test_video_doors.py -k everywhere'),
    ('parts/video', 'np.minimum(steps, max(10/unit, 100*usual))', 'steps', 'tests/test_video_doors.py -k clock'),
    ('parts/video', '(moves[s], ', '(0, ', 'tests/test_video_doors.py -k cover'),
    ('parts/video', 'later = later and not p.idr', 'later = False', 'tests/test_video.py'),
    ('parts/detections', 'ids = [(i - (not nl), obj', 'ids = [(i, obj', 'tests/test_dataset.py -k counts_from_one'),
    ('parts/detections', "raise pickle.UnpicklingError(f'asks for {full}, which is not on the list')",
     'return super().find_class(module, name)', 'tests/test_dataset.py -k "pickle or hostile or call"'),
    ('parts/detect',
     'model.predict(rgb[..., ::-1], classes=keep', 'model.predict(rgb, classes=keep', WIRING + ' -k bgr'),
    ('parts/detect', '[outline].mean() > edge', '[outline].mean() > 9*edge',
     'tests/test_people.py -k left_of_the_background'),
    ('parts/detect', 'return np.median(shifts) >= 2', 'return False', 'tests/test_people.py -k camera'),
    ('parts/detect', 'if not (is_online() or getproxies())', 'if False', 'tests/test_people.py -k without_a_network'),
    ('parts/detect', "with TemporaryDirectory(dir=folder) as part:", "for part in (folder,):",
     'tests/test_people.py -k whole_or_absent'),
    ('parts/tracks', 'key=lambda t: t.good < gate.pictures', 'key=lambda t: 0', 'tests/test_people.py -k number'),
    ('parts/tracks', 'elif not any_usable(tracks, gate)', 'elif False', 'tests/test_people.py -k nobody'),
    ('parts/detections', 'np.clip(box.round(), 0, [width, height, width, height])', 'np.clip(box.round(), 0, None)',
     'tests/test_dataset.py -k "boxes or drop"'),
    ('dataset', 'raw = d.box*(h/d.height if d.height else 1)', 'raw = d.box',
     'tests/test_dataset.py -k boxes'),
    ('parts/core', "bgr = np.ascontiguousarray(rgb[..., ::-1])", 'bgr = np.ascontiguousarray(rgb)',
     WIRING + ' -k red'),
    ('parts/download', "now.get('downloaded_bytes', 0)", "now['downloaded_bytes']",
     'tests/test_dataset.py -k fetched_whole'),
    ('parts/download', 'if bots == 3: raise', 'if bots == 30: raise', 'tests/test_dataset.py -k bot'),
    ('parts/align', "cols['frame'] + fit.offset", "cols['frame'] - fit.offset", WIRING + ' -k alignment'),
    ('parts/align',
     "cols['box']*(fit.height/fit.lines)", "cols['box']*(fit.lines/fit.height)", WIRING + ' -k alignment'),
    ('parts/align', 'if gain.mean() <= 2*gain.std()', 'if gain.mean() <= 200*gain.std()', WIRING + ' -k alignment'),
    # Store
    ('parts/core', 'cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)', 'bgr', WIRING + ' -k red'),
    ('crop_store', 'try: jpeg = self._gets[i](self.keys.item(i))',
     'try: jpeg = self._gets[i](self.keys.item(i-1))', 'tests/test_crop_store.py -k inside'),
    ('parts/packing', 'zlib.crc32(jpeg) == crc and ', 'True and ', 'tests/test_crop_store.py -k changed_byte'),
    ('parts/store', 'return_inverse=True)[1] - (ids < 0).any()', 'return_inverse=True)[1]', WIRING + ' -k no_name'),
    ('parts/store', "square = (std**2 + mean**2).mean(0) - mean.mean(0)**2", 'square = (std**2).mean(0)',
     'tests/test_crop_store.py'),
    # Benchmarks and scores
    ('parts/metrics', '(n/ranks).mean()', '(n/ranks).max()', 'tests/test_benchmarks.py'),
    ('parts/metrics', 'count(row[:j] <= row[j])', 'count(row[:j] < row[j])', 'tests/test_benchmarks.py'),
    ('parts/metrics', 'len(ranks)/ranks[-1]', 'len(ranks)/ranks[0]', 'tests/test_benchmarks.py'),
    ('parts/benchmarks', 'if s.pid >= 0], notes, sizes', 'if s.pid > 0], notes, sizes', WIRING + ' -k distractor'),
    ('parts/metrics', 'for half in halves)', 'for half in halves[:1]*2)', WIRING + ' -k thresholds'),
    ('parts/metrics',
     'np.argmax(fmr <= target + 1e-9, -1)', 'np.argmax(fmr <= 3*target, -1)', 'tests/test_evaluate.py'),
    ('parts/metrics', '[2.5, 97.5]', '[25, 75]', 'tests/test_evaluate.py'),
    ('parts/metrics', 'difference = {k: np.subtract(more[k], less[k], dtype=float) for k in more}',
     'difference = {k: np.subtract(less[k], more[k], dtype=float) for k in more}', 'tests/test_evaluate.py'),
    ('parts/metrics', 'alarm = np.quantile(best[~known], 1 - fpir', 'alarm = np.quantile(best[known], 1 - fpir',
     'tests/test_evaluate.py'),
    ('parts/metrics', 'drawn = drawn[drawn.sum(1) > 0]', 'pass', 'tests/test_bad_sets.py -k lowers_no_threshold'),
    ('parts/metrics', 'row + 1e-6*(pids == q.pid)', 'row - 1e-6*(pids == q.pid)', 'tests/test_bad_sets.py -k equal'),
    ('parts/metrics', 'check_halves(benchmark, halves)', 'pass', 'tests/test_bad_sets.py -k small_set'),
    ('parts/benchmarks', 'for note in bench.notes: log.warning', 'for note in []: log.warning',
     'tests/test_bad_sets.py -k left_out'),
    ('parts/benchmarks', 'mtime_ns=mat.st_mtime_ns', 'mtime_ns=0', 'tests/test_bad_sets.py -k made_before'),
    ('parts/scoring', 'with lock(target) if target', 'with lock(target) if False',
     'tests/test_bad_sets.py -k one_writer'),
    # People, gallery, decisions
    ('parts/tracks', "'overlap': hidden > gate.overlap", "'overlap': hidden > 2", 'tests/test_biometrics.py'),
    ('parts/tracks', 'min(x1, y1, W - x2, H - y2)', 'min(x1, y1)', 'tests/test_biometrics.py'),
    ('parts/tracks', 'key=lambda s: s.quality', 'key=lambda s: -s.quality', 'tests/test_biometrics.py'),
    ('parts/gallery', 'best[name] = max(score, best.get(name, -1))', 'best[name] = min(score, best.get(name, 1))',
     WIRING + ' -k template'),
    ('parts/gallery', "db.execute('DELETE FROM identities WHERE id = ?', [who])", 'pass', 'tests/test_gallery.py'),
    ('parts/gallery', 'best = np.maximum.reduceat', 'best = np.minimum.reduceat', 'tests/test_gallery.py'),
    ('biometrics', "if score >= zone[1]: return 'match'", "if score >= zone[0]: return 'match'",
     'tests/test_biometrics.py'),
    ('biometrics', '@ probe.feature).max()', '@ probe.feature).min()', WIRING + ' -k template'),
    ('biometrics', "classify_score(score, zone) if found else 'no match'", 'classify_score(score, zone)',
     'tests/test_biometrics.py -k places'),
    ('biometrics', 'name_everybody(good, rankings, zone[0])',
     '[r[0][0] if r[0][1] >= zone[0] else None for r in rankings]', 'tests/test_biometrics.py -k places'),
    ('biometrics', 'if name not in elsewhere)', 'if True)', 'tests/test_biometrics.py -k places'),
    ('parts/decisions', 'json.loads(as_json(words | dict(answer=self.answer, decisions=plain)))',
     'words | dict(answer=self.answer, decisions=plain)', 'tests/test_demo.py -k program'),
    ('parts/decisions', '((name, frame) for frame', '((name, t) for frame', 'tests/test_biometrics.py -k possible'),
    ('parts/decisions', 'gain = [s - least', 'gain = [1', 'tests/test_biometrics.py -k possible'),
    ('parts/decisions', 'is not t and theirs & mine', 'is not t', 'tests/test_biometrics.py -k possible'),
    ('parts/gallery', 'except (BadInput, OSError): return missing_picture()',
     'except ValueError: return missing_picture()', 'tests/test_by_hand.py -k lost'),
    ('parts/gallery', 'if not CROP_NAME.fullmatch(str(file)):', 'if False:', 'tests/test_by_hand.py -k leads_out'),
    ('parts/gallery', "and (other,) not in row: best", "and True: best", 'tests/test_by_hand.py -k two_names'),
    ('parts/gallery', 'if len(fits) == len(rivals) == 1:', 'if fits:', 'tests/test_by_hand.py -k fit'),
    ('parts/decisions', 'for n, s in self.ranking if', 'for n, s in self.ranking[9:] if',
     'tests/test_by_hand.py -k two_names'),
    # Around the page
    ('parts/serve', 'not (self.is_here(name) or self.is_proxy(name))', 'False', 'tests/test_serve.py -k other_names'),
    ('parts/serve', 'if origin is None or origin.lower() in', 'if True or origin.lower() in',
     'tests/test_serve.py -k other_pages'),
    ('parts/serve', 'return not self.is_here(name) and any(', 'return any(', 'tests/test_serve.py -k other_pages'),
    ('parts/page', 'cancels=list(overtakes)', 'cancels=None', 'tests/test_browser.py -k "late_pictures or late_does"'),
    ('parts/network', 'if not stays: self.use', 'if True: self.use', 'tests/test_demo.py -k better_network'),
    ('parts/gallery', "checkpoint = default_checkpoint(store.about()['model'])", 'pass',
     'tests/test_demo.py -k keeps_its'),
    ('parts/weights', "[path]*bool(known.get('thresholds'))", '[path]', 'tests/test_demo.py -k imported_network'),
    ('parts/page', 'self.detectors[choose(self.detectors, name, \'detector\')] if name', 'name if name',
     'tests/test_demo.py -k who_finds'),
    ('parts/published', 'get_session().head(', '(lambda *a, **k: 0)(', 'tests/test_demo.py -k fresh_machine'),
    ('parts/page', 'for k in kept if not outside else ()', 'for k in ()', 'tests/test_serve.py -k come_back'),
    ('parts/core', "os.environ.setdefault('OPENCV_IO_MAX_IMAGE_PIXELS', str(2**26))", 'pass',
     'tests/test_pictures.py -k memory'),
    ('parts/core', 'except cv2.error: bgr = None', 'except ZeroDivisionError: bgr = None',
     'tests/test_pictures.py -k one_line'),
    ('parts/core', 'followlinks=True', 'followlinks=False', 'tests/test_stale.py -k link'),
    ('parts/core', "sys.stdout.reconfigure(errors='backslashreplace')", 'pass', 'tests/test_by_hand.py -k terminal'),
    ('parts/core', 'if lost := [k for k, v in given.items() if v == []]:', 'if lost := []:',
     'tests/test_options.py -k "calibrate or detect"'),
    # Own pictures
    ('parts/benchmarks', '(pids == query.pid) & (camids == query.camid)', 'pids < 0', OWN + ' -k junk_and_cameras'),
    ('parts/benchmarks', 'return np.zeros(len(pids), bool)', 'return pids == 0', OWN + ' -k same_split'),
    ('parts/benchmarks', 'keep &= rows[:, 6] > 0', 'keep &= rows[:, 6] > -1', OWN + ' -k on_mot'),
    ('parts/benchmarks', 'return camids != query.camid', 'return camids < 0', OWN + ' -k on_real_crops'),
    ('parts/benchmarks', 'elif len(there) == 1: lost', 'elif len(there) == 0: lost', OWN + ' -k by_definition'),
    ('parts/benchmarks', 'default=0))//2', 'default=0))', OWN + ' -k by_definition'),
    ('parts/benchmarks', 'pid*(drawn is not None), 0)', 'pid, 0)', OWN + ' -k folders_of_people'),
    ('parts/benchmarks', 'seed, os.fsencode(name)', 'seed, pid', OWN + ' -k folders_of_people'),
    ('parts/scoring', 'if len({*names.values()}) == len(paths): break', 'break', OWN + ' -k deep_folders'),
    ('parts/scoring', 'if n > 1 and name in found', 'if n > 9 and name in found', OWN + ' -k deep_folders'),
    ('parts/benchmarks', 'if path.is_file() and path.read_bytes() == jpeg: continue', 'if path.is_file(): continue',
     OWN + ' -k cut_once'),
    ('parts/benchmarks', "re.sub('-(DPM|FRCNN|SDP)$', '', p.name)", 'p.name', OWN + ' -k three_copies'),
    ('parts/benchmarks', 'keep = track >= 0', 'keep = track >= -9', OWN + ' -k without_gt'),
    ('parts/benchmarks', 'rgb = read_rgb(picture)', 'rgb = [read_rgb(picture) for _ in crops][0]',
     OWN + ' -k read_once'),
    ('parts/scoring', 'best = int(np.argmax(', 'best = int(np.argmin(', OWN + ' -k side_by_side'),
    ('parts/scoring', 'if len({*names}) < len(names): names', 'if False: names', OWN + ' -k told_apart'),
    ('parts/scoring', "if getattr(PROTOCOLS.get(protocol), 'figures', None): raise", 'if False: raise',
     OWN + ' -k no_thresholds'),
    ('parts/benchmarks', 'if frames < 1: raise', 'if False: raise', OWN + ' -k makes_no_sense'),
    ('parts/benchmarks', '== {0}: raise', '== {-5}: raise', OWN + ' -k that_are_none'),
    ('parts/benchmarks', "raise ValueError('not six numbers a line')", 'pass', OWN + ' -k broken_gt'),
    ('parts/benchmarks', 'except (NoConfig, ValueError): return None', 'except (NoConfig, ValueError): return 25.',
     OWN + ' -k without_frames'),
    # templates and cameras
    ('parts/tracks', 'return normalize((quality @ self.features)[None])[0]',
     'return (quality @ self.features)/quality.sum()', 'tests/test_biometrics.py -k length_1'),
    ('parts/gallery', 'normalize([np.frombuffer(x, np.float32) for _, x in rows])',
     'np.stack([np.frombuffer(x, np.float32) for _, x in rows])', 'tests/test_biometrics.py -k old_gallery'),
    ('parts/supervised', '        if not share or', '        if True or', 'tests/test_cameras.py -k which_steps'),
    ('parts/weights', '    finally: set_statistics(model, own)\n    return out', '    finally: pass\n    return out',
     'tests/test_cameras.py -k put_back'),
    ('parts/weights', 'if len(here)>=LEAST else own', 'if True else own', 'tests/test_cameras.py -k few_pictures'),
    ('parts/cameras', 'self.tracks/(self.tracks+FEW) if self.tracks>=FEW else 0.', 'self.tracks/(self.tracks+FEW)',
     'tests/test_cameras.py -k add_up'),
    ('parts/cameras', 'if clip in profile.clips: return profile', 'if False: return profile',
     'tests/test_cameras.py -k few_people'),
    ('parts/camera_tab', 'if self.cameras else matcher', 'if False else matcher',
     'tests/test_cameras.py -k street'),
    ('demo', 'progress, claimed, self.camera(camera)), film', 'progress, claimed), film',
     'tests/test_cameras.py -k street'),
    ('demo', "CONSENT, progress,\n                           self.camera(camera))", 'CONSENT, progress)',
     'tests/test_browser.py -k cameras'),
]

def plant(copy, module, old, new):
    "Put a fault into the copy; returns the text to put back, or None where its place is gone."
    path = copy/'reid_nb'/f'{module}.py'
    text = path.read_text()
    if text.count(old) != 1: return None
    path.write_text(text.replace(old, new))
    return text

def dies(copy, tests):
    "Does one of the tests fail?"
    env = dict(os.environ, PYTHONPATH=str(copy), OMP_NUM_THREADS='1', PYTHONDONTWRITEBYTECODE='1')
    env.setdefault('REID_DATA', str(ROOT.parent/'shared'/'data'))
    words = tests.split(' ', 2)
    if len(words) == 3: words[2] = words[2].strip('"')
    call = [sys.executable, '-m', 'pytest', '-n', '0', '-q', '-x', '-p', 'no:cacheprovider', *words]
    done = subprocess.run(call, cwd=copy, env=env, capture_output=True, text=True)
    if done.returncode not in (0, 1): print(done.stdout[-500:], done.stderr[-500:])
    return done.returncode == 1

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', default='', help='faults whose module, place or tests have this word')
    parser.add_argument('--first', type=int, default=1, help='number of the fault to begin with')
    parser.add_argument('--list', action='store_true', help='print them, plant none')
    a = parser.parse_args()
    chosen = [(k, f) for k, f in enumerate(FAULTS, 1) if k >= a.first and a.only in ' '.join(f)]
    if a.list: return print('\n'.join(f'{k:3} {m}: {old}  ->  {new}   ({t})' for k, (m, old, new, t) in chosen))
    survived, begun = [], time.monotonic()
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/'copy'
        shutil.copytree(ROOT, copy, symlinks=True,
                        ignore=shutil.ignore_patterns('.git', '.venv', '_proc', '_docs', 'screenshots'))
        for k, (module, old, new, tests) in chosen:
            before = plant(copy, module, old, new)
            state = 'NO SUCH PLACE' if before is None else 'dies' if dies(copy, tests) else 'SURVIVES'
            if before is not None: (copy/'reid_nb'/f'{module}.py').write_text(before)
            if state != 'dies': survived.append(k)
            print(f'{k:3} {state:14} {module}: {new.strip().splitlines()[0][:80]}', flush=True)
    print(f'{len(chosen)} faults, {len(chosen) - len(survived)} found, {time.monotonic() - begun:.0f} s; '
          f'left: {survived or "none"}')

if __name__ == '__main__': main()
