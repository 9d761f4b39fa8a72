// Load for serving.py, run by k6: requests start on time whether or not earlier ones were answered (open loop).
import http from 'k6/http';
import exec from 'k6/execution';
import { SharedArray } from 'k6/data';
import { Counter, Trend } from 'k6/metrics';

const plan = JSON.parse(open(__ENV.PLAN));
// A path each, or a body each where there is one.
const requests = new SharedArray('requests', () => JSON.parse(open(plan.requests)));
const latency = new Trend('latency', true);
const wrong = new Counter('wrong');
const params = { headers: plan.headers };

const duration = `${plan.seconds}s`;
let shape = plan.rate
  ? { executor: 'constant-arrival-rate', rate: plan.rate, timeUnit: '1s', preAllocatedVUs: plan.users, maxVUs: plan.users, duration }
  : { executor: 'constant-vus', vus: plan.users, duration };
if (plan.count) shape = { executor: 'shared-iterations', vus: plan.users, iterations: plan.count, maxDuration: '10m' };

export const options = {
  scenarios: { load: shape },
  discardResponseBodies: true,
  systemTags: [],
  summaryTrendStats: ['p(50)', 'p(95)', 'p(99)', 'max', 'count'],
};

export default function () {
  const place = exec.scenario.iterationInTest;
  const request = requests[(plan.first + place) % requests.length];
  const due = plan.rate ? (place * 1000) / plan.rate : 0;
  const late = plan.rate ? Date.now() - exec.scenario.startTime - due : 0;
  const answer = plan.post ? http.post(plan.url, request, params) : http.get(plan.url + request, params);
  if (answer.status !== 200) wrong.add(1);
  // From when the request was due, not from when it could be sent: a stall counts for all that it held up. The clock
  // has milliseconds; what may be its rounding is no delay. Connections are opened in the first moments.
  if (!plan.rate || due >= plan.warm_up_s * 1000) latency.add(answer.timings.duration + (late > 1 ? late : 0));
}

export function handleSummary(data) {
  return { [plan.summary]: JSON.stringify(data.metrics) };
}
